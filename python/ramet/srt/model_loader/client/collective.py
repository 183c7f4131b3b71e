"""Owns filling an arena with broadcasts from ranks of a seed: the client's side. Knows SGLang's routes for it."""

import threading
import time
from collections.abc import Callable, Sequence

import msgspec
import torch

from ramet.srt.configs.load_config import LoadConfig
from ramet.srt.distributed.pair_group import RECEIVER, PairGroup, connect
from ramet.srt.model_loader.arena.base import ReceiveBuffer, WeightArena
from ramet.srt.model_loader.client.seed_instance import SeedRank
from ramet.srt.model_loader.remote_instance_weight_loader_utils import (
    INIT_SEND_GROUP_PATH,
    SEND_WEIGHTS_PATH,
    post_to_seed,
)
from ramet.srt.model_loader.transport.broadcast_steps import (
    is_direct,
    make_broadcast_steps,
    packing_buffer,
    source_rows,
    target_rows,
    unpack,
)
from ramet.srt.utils.net import format_address, local_address
from ramet.srt.utils.outside_json import decode_json
from ramet.srt.weights.copy_op import CopyOp
from ramet.srt.weights.errors import WeightTransferError
from ramet.srt.weights.manifest import layout_digest
from ramet.srt.weights.registration import InitSendGroupAnswer, InitSendGroupBody, SendWeightsBody

MAX_TIMEOUT_S = 600.0
SEND_TIMEOUT_S = 3600.0  # for the request that lasts as long as the transfer
BUSY_WORDS = "try again in a moment"  # in the refusal of a seed that sends to as many others as it may
BUSY_PERIOD_S, BUSY_TIMEOUT_S = 0.5, 20.0
LAST_WORDS_S = 1.0  # for the seed to say why it has broken off


def open_collective(
    rank: SeedRank, arena: WeightArena, config: LoadConfig
) -> "CollectiveSource | UpstreamCollectiveSource":
    """A rank of a seed, of Ramet's or of upstream's kind. Raises WeightTransferError if it can't be paired."""
    kind = UpstreamCollectiveSource if rank.answer.manifest is None else CollectiveSource
    return kind(rank, arena, config)


class _Pair:
    """The talk with one rank of a seed: its two requests, and the group of two."""

    def __init__(self, rank: SeedRank, arena: WeightArena, config: LoadConfig) -> None:
        self.rank = rank
        self.timeout_s = min(config.timeout_s, MAX_TIMEOUT_S)
        self.backend = arena.broadcast_backend
        self.arena = arena
        self._target: ReceiveBuffer | None = None
        self._group: PairGroup | None = None
        self._sending: threading.Thread | None = None
        self._failure = ""  # what the seed has answered to a request that was still open

    def post(self, path: str, body: msgspec.Struct, timeout_s: float) -> InitSendGroupAnswer:
        """Raises OSError if the seed does not do it."""
        try:
            _, data = post_to_seed(self.rank.server, path, body, timeout_s)
            answer = decode_json(data, InitSendGroupAnswer)
        except ValueError as error:
            raise OSError(f"its answer to {path} is of no use: {error}") from error
        if not answer.success:
            raise OSError(answer.message)
        return answer

    def post_beside(self, path: str, body: msgspec.Struct) -> None:
        """Send a request that is answered when its work is done, and remember a failure."""

        def work() -> None:
            try:
                self.post(path, body, SEND_TIMEOUT_S)
            except OSError as error:
                self._failure = self._failure or str(error)

        self._sending = threading.Thread(target=work, name="send-weights-request", daemon=True)
        self._sending.start()

    @property
    def memory(self) -> torch.Tensor:
        """The arena's bytes, as far as broadcasts may write them."""
        assert self._target is not None, "the two sides have not met"
        return self._target.memory

    def meet(self, host: str, port: int, name: str) -> None:
        """Raises OSError if the seed does not come."""
        self._target = self.arena.open_receive_buffer()
        address = local_address(format_address(host, port))
        store = connect(host, port, self.timeout_s)
        self._group = PairGroup(store, name, RECEIVER, self.memory.device, address, self.timeout_s)

    def barrier(self) -> None:
        assert self._group is not None
        self._group.barrier()

    def warm_up(self) -> None:
        """Raises OSError as `receive` does."""
        assert self._group is not None
        with self.arena.work_context():
            self._run(self._group.warm_up)

    def receive(self, tensor: torch.Tensor) -> None:
        """Raises OSError if the seed breaks off; with the seed's words for it, if it has any."""
        assert self._group is not None
        group = self._group
        self._run(lambda: group.broadcast(tensor))

    def _run(self, operation: Callable[[], None]) -> None:
        try:
            operation()
        except OSError as error:
            if self._sending is not None:
                self._sending.join(LAST_WORDS_S)
            raise OSError(self._failure or str(error)) from error

    def close(self) -> None:
        """After everything has been received."""
        with self.arena.work_context():
            self.arena.synchronize()  # rows may still be sorted out
        if self._group is not None:
            self._group.close()
        if self._target is not None:
            self._target.close()

    def cut_off(self) -> None:
        """After a failure: nothing more reaches the arena."""
        if self._target is not None:
            self._target.cut_off()
        if self._group is not None:
            self._group.close(failed=True)


class CollectiveSource:
    """One rank of a Ramet seed, which is told what to send: a few long ranges, whatever the topologies."""

    name = "nccl"

    def __init__(self, rank: SeedRank, arena: WeightArena, config: LoadConfig) -> None:
        self._pair = _Pair(rank, arena, config)
        self.measured_seconds = 0.0  # of the broadcasts, without meeting before them
        self.close, self.cut_off = self._pair.close, self._pair.cut_off
        self._steps: list[list[CopyOp]] = []
        self._has_met = False
        self._buffer: torch.Tensor | None = None
        own, theirs = arena.manifest.parallel, rank.answer.rank
        ports = config.send_weights_group_ports
        if ports and theirs != own.world_rank:
            raise WeightTransferError("agree", theirs, rank.seed, "a list of ports pairs ranks of equal numbers, but "
                                      f"rank {own.world_rank} needs rank {theirs}: leave the list out")  # fmt: skip
        self._port = str(ports[theirs]) if ports else ""

    def make_steps(self, ops: Sequence[CopyOp]) -> list[list[CopyOp]]:
        self._steps = list(make_broadcast_steps(ops))
        return self._steps

    def run(self, step: list[CopyOp]) -> None:
        """Receive the next broadcast. Raises OSError if the seed does not send it."""
        if not self._has_met:
            self._meet()
            self._has_met = True
        start = time.perf_counter()
        self._receive(step)
        self.measured_seconds += time.perf_counter() - start

    def _receive(self, step: list[CopyOp]) -> None:
        memory, rows = self._pair.memory, target_rows(step)
        with self._pair.arena.work_context():
            if is_direct(rows):
                self._pair.receive(memory[rows[0].offset : rows[0].stop])
                return
            # Kept until the end: a transport that was given up may still write to it.
            self._buffer = packing_buffer(rows, memory.device)
            self._pair.receive(self._buffer)
            unpack(self._buffer, rows, memory)

    def _meet(self) -> None:
        rank = self._pair.rank
        manifest = rank.answer.manifest
        assert manifest is not None
        body = InitSendGroupBody(
            ports=self._port,
            backend=self._pair.backend,
            rank=rank.answer.rank,
            role=manifest.role,
            broadcasts=[[msgspec.to_builtins(rows) for rows in source_rows(step)] for step in self._steps],
            layout=layout_digest(manifest),
            timeout_s=self._pair.timeout_s,
            warm_up=True,
        )
        answer = self._ask_for_group(body)
        self._pair.meet(answer.master_address, int(answer.ports), answer.transfer_id)
        send = SendWeightsBody(group_name=answer.transfer_id, rank=rank.answer.rank, role=manifest.role)
        self._pair.post_beside(SEND_WEIGHTS_PATH, send)
        if answer.warm_up:  # a seed that does not know of it would send the first range instead
            self._pair.warm_up()

    def _ask_for_group(self, body: InitSendGroupBody) -> InitSendGroupAnswer:
        """The seed's answer; one that sends to as many others as it may is asked again for a while."""
        deadline = time.monotonic() + min(BUSY_TIMEOUT_S, self._pair.timeout_s)
        while True:
            try:
                return self._pair.post(INIT_SEND_GROUP_PATH, body, self._pair.timeout_s)
            except OSError as error:
                if BUSY_WORDS not in str(error) or time.monotonic() > deadline:
                    raise
            time.sleep(BUSY_PERIOD_S)


class UpstreamCollectiveSource:
    """The equal rank of an upstream seed, which sends every parameter in the model's order, at ports known before."""

    name = "nccl"
    measured_seconds = 0.0

    def __init__(self, rank: SeedRank, arena: WeightArena, config: LoadConfig) -> None:
        parallel = arena.manifest.parallel
        if parallel.pp_size > 1 or parallel.dp_size > 1:
            raise WeightTransferError("agree", rank.answer.rank, rank.seed, "an upstream seed sends to tensor-parallel "
                                      "ranks alone, not to stages or replicas")  # fmt: skip
        self._pair = _Pair(rank, arena, config)
        self.close, self.cut_off = self._pair.close, self._pair.cut_off
        self._manifest = arena.manifest
        self._ports = config.send_weights_group_ports

    def make_steps(self, ops: Sequence[CopyOp]) -> list[list[CopyOp]]:
        return [list(ops)]

    def run(self, _step: list[CopyOp]) -> None:
        """Receive everything, which is the one step. Raises OSError if the seed does not send it."""
        pair, ports = self._pair, self._ports
        tp_rank = self._manifest.parallel.tp_rank
        joined = ",".join(map(str, ports))
        # The same on all ranks of this client, without a host's name in it: the ports are this client's alone.
        name = f"send_weights_{joined.replace(',', '-')}"
        # The first rank asks for all of them, as upstream's clients do.
        if tp_rank == 0:
            init = InitSendGroupBody(master_address=pair.rank.server.address.host, ports=joined, group_name=name,
                                     backend=pair.backend)  # fmt: skip
            pair.post_beside(INIT_SEND_GROUP_PATH, init)
        pair.meet(pair.rank.server.address.host, ports[tp_rank], f"{name}_{ports[tp_rank]}_{tp_rank}")
        pair.barrier()
        if tp_rank == 0:
            send = SendWeightsBody(master_address=pair.rank.server.address.host, ports=joined, group_name=name)
            pair.post_beside(SEND_WEIGHTS_PATH, send)
        with pair.arena.work_context():
            for entry in self._manifest.entries:
                part = pair.memory[entry.offset : entry.offset + entry.nbytes]
                pair.receive(part.view(getattr(torch, entry.dtype)).view(entry.shape))
