"""Owns the groups in which a rank receives what trainers broadcast. What becomes of the tensors is TensorStage's."""

import contextlib
import logging
import math
import threading
from collections.abc import Generator, Iterator
from typing import NamedTuple

import torch

from ramet.srt.distributed.gloo_receiver import LEFT, GlooReceiver
from ramet.srt.distributed.nccl_receiver import NcclReceiver, StatelessReceiver
from ramet.srt.distributed.receiver_messages import Place
from ramet.srt.weights.manifest import element_size
from ramet.srt.weights.update_messages import BroadcastTensors, JoinGroupReq

logger = logging.getLogger(__name__)

NUM_REMEMBERED = 1000  # groups: no more are being joined at a time

Receiver = GlooReceiver | NcclReceiver


class Expected(NamedTuple):
    """A tensor that is to come."""

    name: str
    dtype: str
    shape: list[int]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * element_size(self.dtype)


class TrainerGroups:
    """A rank's memberships. One that has failed is none any more: whoever goes on makes the group again.

    Args:
        device: of the rank's weights; NCCL receives there, gloo on the host.
    """

    def __init__(self, world_rank: int, device: torch.device):
        self._world_rank = world_rank
        self._device = device
        self._members: dict[str, tuple[int, Receiver]] = {}  # with the group's number, by its name
        self._num_calls: dict[str, int] = {}  # in which something was received
        self._left: set[int] = set()  # numbers of groups that were left before they were joined
        self._lock = threading.Lock()

    def join(self, step: JoinGroupReq) -> None:
        """Meet the trainer and the others, in the place of a group that had the name.

        Raises:
            ValueError: if there is no such group here.
            OSError: if they don't come.
        """
        receiver = self._make(step)
        with self._lock:
            if step.number in self._left:
                receiver.close()
                raise OSError(LEFT)
            _, old = self._members.get(step.name, (0, None))
            self._members[step.name] = step.number, receiver
            self._num_calls[step.name] = 0
        if old is not None:
            old.close()
        # vLLM's have no name of their own on the way.
        name = "" if step.is_stateless else step.name
        rank = step.rank_offset + self._world_rank
        try:
            receiver.join(
                Place(host=step.host, port=step.port, rank=rank, size=step.size, name=name, timeout_s=step.timeout_s)
            )
        except OSError as error:
            self._forget(step.name, receiver)
            raise OSError(f"the group {step.name!r} can't be joined: {error}") from None
        logger.info("rank %d: is rank %d of %d in a trainer's group %r", self._world_rank, rank, step.size, step.name)

    def leave(self, name: str, number: int) -> None:
        """Leave a group, or don't join it if that is about to happen; what is waited for in it ends with an error.

        Any thread may call it. Another group that has the name by now stays.
        """
        with self._lock:
            found, receiver = self._members.get(name, (0, None))
            if receiver is None or number != found:
                self._left = {one for one in self._left if one > number - NUM_REMEMBERED} | {number}
                return
            del self._members[name]
        receiver.close()

    def close(self) -> None:
        """Leave all of them."""
        for name, (number, _) in list(self._members.items()):
            self.leave(name, number)

    def receive(self, source: BroadcastTensors) -> Generator[tuple[str, torch.Tensor], None, None]:
        """The tensors that a trainer broadcasts; closed early, the rest is received too, as the trainer waits for that.

        Raises:
            ValueError: if there is no such group.
            OSError, MemoryError: if they don't come as announced, or there is no room: the group is left then.
        """
        with self._lock:
            _, receiver = self._members.get(source.group, (0, None))
        if receiver is None:
            raise ValueError(
                f"there is no group {source.group!r} with a trainer, or none any more: it must be made first"
            )
        self._check_call(source, receiver)
        broadcasts = expected_broadcasts(source)
        try:
            for broadcast in broadcasts:
                yield from _tensors(self._next(receiver, broadcast, source), broadcast)
        except GeneratorExit:
            with contextlib.suppress(OSError, MemoryError, RuntimeError):
                for broadcast in broadcasts:
                    self._next(receiver, broadcast, source)
            raise

    def _check_call(self, source: BroadcastTensors, receiver: Receiver) -> None:
        """Leave the group, and raise OSError, if calls before were refused and what was sent in them is still to come.

        It would be taken for what this one says: of the same size, and of an earlier step.
        """
        with self._lock:
            missed = source.call - self._num_calls.get(source.group, 0) - 1 if source.call else 0
            self._num_calls[source.group] = source.call
        if missed:
            self._forget(source.group, receiver)
            raise OSError(
                f"what a trainer may have sent with {missed} calls that were refused has not been received: the group "
                f"{source.group!r} is left, and must be made again"
            )

    def _next(self, receiver: Receiver, broadcast: list[Expected], source: BroadcastTensors) -> torch.Tensor:
        try:
            return receiver.receive(sum(one.nbytes for one in broadcast), source.timeout_s)
        except (OSError, MemoryError, RuntimeError) as error:
            self._forget(source.group, receiver)
            names = broadcast[0].name if len(broadcast) == 1 else f"{broadcast[0].name} to {broadcast[-1].name}"
            kind = MemoryError if isinstance(error, MemoryError) else OSError
            raise kind(f"{names} did not come, and the group {source.group!r} is left: {error}") from None

    def _forget(self, name: str, receiver: Receiver) -> None:
        """Leave a group for good, unless the name is another's already."""
        with self._lock:
            if self._members.get(name, (0, None))[1] is receiver:
                del self._members[name]
        receiver.close()

    def _make(self, step: JoinGroupReq) -> Receiver:
        has_gpu = self._device.type == "cuda"
        if step.backend == "gloo" or (step.backend == "auto" and not has_gpu):
            return GlooReceiver()
        if not has_gpu:
            raise ValueError("these weights are not on a GPU: a group with NCCL can't be joined, one with gloo can")
        return StatelessReceiver(self._device) if step.is_stateless else NcclReceiver(self._device)


def expected_broadcasts(source: BroadcastTensors) -> Iterator[list[Expected]]:
    """What each broadcast carries."""
    bucket: list[Expected] = []
    nbytes = 0
    for one in map(Expected, source.names, source.dtypes, source.shapes):
        bucket.append(one)
        nbytes += one.nbytes
        if source.bucket_nbytes is None or nbytes > source.bucket_nbytes:
            yield bucket
            bucket, nbytes = [], 0
    if bucket:
        yield bucket


def _tensors(content: torch.Tensor, broadcast: list[Expected]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in a broadcast, uint8, where they stand one behind the other."""
    start = 0
    for one in broadcast:
        part = content[start : start + one.nbytes]
        if start % element_size(one.dtype):
            part = part.clone()
        yield one.name, part.view(getattr(torch, one.dtype)).view(one.shape)
        start += one.nbytes
