"""Owns a seed's side of transfers by broadcast: a thread and a group of two for each, beside serving."""

import logging
import secrets
import socket
import threading
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist

from ramet.srt.distributed.pair_group import SENDER, PairGroup, listen, open_store, wait_for_client
from ramet.srt.errors import ServiceError
from ramet.srt.model_loader.arena.base import WeightArena
from ramet.srt.model_loader.transport.broadcast_steps import Broadcast, ByteRows, check_broadcasts, pack
from ramet.srt.weights.control_messages import InitSendGroupOutput, InitSendGroupReq, SendWeightsOutput
from ramet.srt.weights.manifest import layout_digest

logger = logging.getLogger(__name__)

MAX_TRANSFERS = 16
MAX_TIMEOUT_S = 600.0
KEPT_RESULTS_S = 60.0  # an ended transfer's result, for a request that comes late
CONNECT_TIMEOUT_S = 30.0  # for the client to connect, which is all that it has to do after the answer
MEET_TIMEOUT_S = 60.0  # for it to join the group then, and to ask for what was agreed on
GRACE_S = 2.0  # after which a transfer whose client has not connected gives way to the next client
POLL_S = 0.1


class SendGroups:
    """The transfers of one rank. Each ends by itself: every step of it has a deadline."""

    def __init__(self, arena: WeightArena, address: str) -> None:
        """
        Args:
            address: of this node, where clients reach it.
        """
        self._arena = arena
        self._address = address
        self._lock = threading.Lock()
        self._transfers: dict[str, _Transfer] = {}

    def init(self, request: InitSendGroupReq) -> InitSendGroupOutput:
        """Begin a transfer: listen for its client. An upstream client is waited for, as it expects.

        Raises:
            ValueError: if the request can't be fulfilled, or the client does not come.
            ServiceError: if it could be later.
        """
        transfer = self._make(request)
        with self._lock:
            now = time.monotonic()
            self._transfers = {key: one for key, one in self._transfers.items() if not one.is_forgotten(now)}
            if transfer.id in self._transfers and not self._transfers[transfer.id].ended.is_set():
                raise ValueError(f"there is a group {transfer.id!r} already")
            self._make_room(now)
            try:
                port = transfer.listen(request.port)
            except OSError as error:
                raise ValueError(str(error)) from None
            self._transfers[transfer.id] = transfer
        transfer.thread.start()
        if request.group_name:
            transfer.wait_joined()
        return InitSendGroupOutput(
            transfer_id=transfer.id, master_address=self._address, port=port, warm_up=transfer.warms_up
        )

    def send(self, transfer_id: str) -> SendWeightsOutput:
        """Send what was agreed on; returns when it has been sent.

        Raises:
            ValueError: if there is no such transfer, it was sent before, or it fails.
        """
        with self._lock:
            transfer = self._transfers.get(transfer_id)
        if transfer is None:
            raise ValueError(f"there is no transfer {transfer_id!r}: it has failed, or has waited for too long")
        return transfer.send()

    def close(self) -> None:
        """End the transfers that wait; those that are sending end by their deadlines."""
        with self._lock:
            transfers = list(self._transfers.values())
        for transfer in transfers:
            transfer.cancel()

    def _make_room(self, now: float) -> None:
        """Let whoever has not come for longest go. Raises ServiceError if all have come, or may still be on the way."""
        open_ones = [one for one in self._transfers.values() if not one.has_given_way and not one.ended.is_set()]
        if len(open_ones) < MAX_TRANSFERS:
            return
        oldest = min(open_ones, key=lambda one: (one.has_come, one.begun_s))
        if oldest.has_come or now - oldest.begun_s < GRACE_S:
            raise ServiceError(f"this rank is sending to {MAX_TRANSFERS} others already: try again in a moment")
        oldest.give_way()

    def _make(self, request: InitSendGroupReq) -> "_Transfer":
        if not 0 < request.timeout_s <= MAX_TIMEOUT_S:
            raise ValueError(f"timeout_s must be above 0 and at most {MAX_TIMEOUT_S:g}; got {request.timeout_s}")
        if request.backend and request.backend != self._arena.broadcast_backend:
            raise ValueError(f"the backend {request.backend!r} can't send from {self._arena.device}")
        if not request.group_name and request.layout != layout_digest(self._arena.manifest):
            raise ValueError("another layout is in this memory")
        broadcasts = [tuple(ByteRows(*rows) for rows in one) for one in request.broadcasts]
        check_broadcasts(broadcasts, self._arena.nbytes)
        return _Transfer(self._arena, self._address, request, broadcasts)


class _Transfer:
    """One client's rank: met, sent to and forgotten, in a thread of its own."""

    def __init__(
        self, arena: WeightArena, address: str, request: InitSendGroupReq, broadcasts: list[Broadcast]
    ) -> None:
        self.id = request.group_name or secrets.token_hex(16)
        self.begun_s = time.monotonic()
        self.has_come = False  # whether the client, or whoever, has connected
        self.has_given_way = False
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._run, name="send-weights", daemon=True)
        self._is_upstream = bool(request.group_name)
        self.warms_up = request.warm_up and not self._is_upstream
        self._arena = arena
        self._address = address
        self._broadcasts = broadcasts
        self._timeout_s = request.timeout_s
        self._listener: socket.socket | None = None
        self._joined = threading.Event()
        self._go = threading.Event()
        self._was_asked = threading.Lock()
        self._is_sent = False
        self._error = ""
        self._end_s = 0.0
        self._num_bytes = 0
        self._seconds = 0.0

    def listen(self, port: int) -> int:
        """Open the port at which the client will find the store. Returns it. Raises OSError if it is in use."""
        self._listener = listen(self._address, port)
        return self._listener.getsockname()[1]

    def is_forgotten(self, now: float) -> bool:
        return self.ended.is_set() and now - self._end_s > KEPT_RESULTS_S

    def wait_joined(self) -> None:
        """Raises ValueError if the client does not come."""
        self._joined.wait()  # the thread's own deadlines end it
        if self._error:
            raise ValueError(self._error)

    def send(self) -> SendWeightsOutput:
        if not self._was_asked.acquire(blocking=False):
            raise ValueError(f"the transfer {self.id!r} was asked for before")
        self._go.set()
        self.ended.wait()  # the thread's own deadlines end it
        if self._error:
            raise ValueError(self._error)
        return SendWeightsOutput(num_bytes=self._num_bytes, seconds=self._seconds)

    def cancel(self, why: str = "the seed is ending") -> None:
        self._error = self._error or why
        self._go.set()

    def give_way(self) -> None:
        """End, because others wait and nobody has connected."""
        self.has_given_way = True
        self.cancel("the client has not connected, and others waited")

    def _run(self) -> None:
        try:
            self._meet_and_send()
            self._is_sent = not self._error
        except (OSError, RuntimeError, MemoryError) as error:
            self._error = self._error or str(error)  # the text alone: the error holds the store, and so its port
        finally:
            if not self._is_sent:
                self._error = self._error or "it broke off"
                rank = self._arena.manifest.parallel.world_rank
                level = logging.DEBUG if self.has_given_way else logging.WARNING
                logger.log(level, "rank %d: the weights were not sent: %s", rank, self._error)
            self._end_s = time.monotonic()
            self.ended.set()
            self._joined.set()

    def _await_client(self) -> dist.TCPStore:
        """The store, once somebody has connected. Raises OSError if nobody does in time."""
        assert self._listener is not None
        timeout_s = min(self._timeout_s, CONNECT_TIMEOUT_S)
        deadline = time.monotonic() + timeout_s
        with self._listener as listener:
            while not wait_for_client(listener, POLL_S):
                if self._error:
                    raise OSError(self._error)
                if time.monotonic() > deadline:
                    raise TimeoutError(f"the other side has not come within {timeout_s:g} s")
            self.has_come = True
            return open_store(listener, self._address, min(self._timeout_s, MEET_TIMEOUT_S))

    def _meet_and_send(self) -> None:
        store = self._await_client()
        device = self._arena.byte_tensor().device
        meet_timeout_s = min(self._timeout_s, MEET_TIMEOUT_S)
        group = PairGroup(store, self.id, SENDER, device, self._address, meet_timeout_s)
        del store  # the group has it, and gives the port back with it
        failed = True
        try:
            if self._is_upstream:
                with self._arena.work_context():
                    group.barrier()
            self._joined.set()
            if not self._go.wait(meet_timeout_s):
                raise TimeoutError(f"the client has met this rank and asked for nothing within {meet_timeout_s:g} s")
            if self._error:
                return
            group.timeout_s = self._timeout_s
            with self._arena.reading(), self._arena.work_context():
                if self.warms_up:
                    group.warm_up()
                start = time.perf_counter()
                for tensor in self._tensors():
                    group.broadcast(tensor)
                    self._num_bytes += tensor.nbytes
            self._seconds = time.perf_counter() - start
            failed = False
        finally:
            group.close(failed)
        logger.info("rank %d: sent %.3f GB of weights in %.2f s", self._arena.manifest.parallel.world_rank,
                    self._num_bytes / 1e9, self._seconds)  # fmt: skip

    def _tensors(self) -> Iterator[torch.Tensor]:
        """What each broadcast sends. For an upstream client: every parameter, in the model's order."""
        if self._is_upstream:
            for entry in self._arena.manifest.entries:
                yield self._arena.tensor(entry)
            return
        memory = self._arena.byte_tensor()
        for broadcast in self._broadcasts:
            yield pack(broadcast, memory)
