"""Owns how a rank gets the tensors of one call of an update. What becomes of them is TensorStage's."""

import math
from collections.abc import Generator
from typing import TypeAlias

import torch

from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.model_executor.trainer_groups import TrainerGroups
from ramet.srt.model_loader.checkpoint_engine import receive_lent
from ramet.srt.model_loader.tensor_pickles import Bucket, BucketPart, read_tensors
from ramet.srt.model_loader.tensor_stage import RankPart
from ramet.srt.utils.net import host_identity
from ramet.srt.utils.pickled_values import PickleError
from ramet.srt.weights.errors import name_some
from ramet.srt.weights.manifest import dtype_name
from ramet.srt.weights.update_messages import BroadcastTensors, LentTensors, PickledTensors, TensorsSource

Tensors: TypeAlias = Generator[tuple[str, torch.Tensor | RankPart], None, None]


class TensorFeeds:
    """A rank's ways to tensors, one for each type of TensorsSource, and what they keep between calls.

    Whoever adds a source adds a message to TensorsSource (weights/update_messages.py), which `PutTensorsReq` carries to
    every rank of every replica, and a case to `open` and to `name_of`. Nothing else is needed: the main process hands
    the message to `WeightSessions.put` (managers/weight_sessions.py), with or without a session around.

    `open` gives a generator over (name, tensor):

    - names as checkpoints of the model have them, in any spelling that is read from files (fused, stacked, with or
      without prefix); the order is free, and no tensor may come twice between the begin and the end of a session;
    - tensors whole, not sharded (or a RankPart, for a tensor as this rank holds it), in a type that a file might have,
      on the host or on the arena's device, where their bytes must have arrived: whoever receives on a stream waits for
      it before the yield;
    - a tensor is done with when the next one is asked for: its memory may be used again from then on.

    It runs in the thread of the rank's updates, where the arena's device is current, beside passes, on all ranks at the
    same time, and is run to its end. If a tensor is refused, all ranks refuse it, and the generator is closed at that
    yield: where others wait until everything is taken, `finally` is the place to take the rest. What it raises
    (ValueError, OSError, RuntimeError, TimeoutError) with a line for people ends the update, and what serves is
    untouched. It must not wait for ever.
    """

    def __init__(self, parallel: ParallelConfig, device: torch.device | None = None):
        """
        Args:
            device: of the rank's weights; None: the host.
        """
        self._parallel = parallel
        self._device = device or torch.device("cpu")
        self.groups = TrainerGroups(parallel.world_rank, self._device)

    def open(self, source: TensorsSource) -> Tensors:
        """The tensors of a call."""
        match source:
            case PickledTensors():
                return _open_pickle(source, self._parallel)
            case BroadcastTensors():
                return self.groups.receive(source)
            case LentTensors():
                gpu_id = -1 if self._device.index is None else self._device.index
                return receive_lent(self._own_socket(source.sockets), gpu_id, source.timeout_s)

    def name_of(self, source: TensorsSource) -> str:
        """What load reports and answers call such a source."""
        match source:
            case PickledTensors():
                return "tensors"
            case BroadcastTensors():
                return "broadcast"
            case LentTensors():
                return "ipc"

    def _own_socket(self, sockets: dict[str, str]) -> str:
        """The one that is this rank's. Raises ValueError if there is none."""
        key = f"CPU-{self._parallel.world_rank}"
        if self._device.type == "cuda":
            key = f"GPU-{torch.cuda.get_device_properties(self._device).uuid}"
        if key not in sockets:
            raise ValueError(f"zmq_handles has no socket for {key}, but for {name_some(sorted(sockets))}")
        return sockets[key]


def _open_pickle(source: PickledTensors, parallel: ParallelConfig) -> Tensors:
    if source.host_identity != host_identity():
        raise ValueError("this rank is on another host than the tensors")
    is_own = len(source.payloads) > 1
    payload = source.payloads[parallel.tp_rank if is_own else 0]
    try:
        found = read_tensors(payload, parallel.tp_rank)
    except PickleError as error:
        raise ValueError(f"the pickle of tensors can't be read: {error}") from None
    if isinstance(found, Bucket) != (source.load_format == "flattened_bucket"):
        kind = "a flat bucket" if isinstance(found, Bucket) else "no flat bucket"
        raise ValueError(f"the pickle holds {kind}, but the load_format is {source.load_format!r}")
    is_first = parallel.dp_rank == parallel.pp_rank == 0  # of those that open the same memory
    takes_over = is_first and (is_own or parallel.tp_rank == 0)
    if isinstance(found, Bucket):
        flat = found.flat.open(takes_over=takes_over)
        _await_arrival(flat)
        for part in found.parts:
            yield part.name, _cut_out(flat, part)
        return
    for name, pickled in found:
        tensor = pickled.open(takes_over=takes_over or is_first and pickled.is_of_rank)
        _await_arrival(tensor)
        yield name, RankPart(tensor) if source.load_format == "direct" else tensor


def _await_arrival(tensor: torch.Tensor) -> None:
    """On a GPU, opening a tensor makes the stream wait for the sender's last work on it."""
    if tensor.is_cuda:
        torch.cuda.current_stream(tensor.device).synchronize()


def _cut_out(flat: torch.Tensor, part: BucketPart) -> torch.Tensor:
    """One tensor of a bucket, which may hold the bytes of all types side by side, or numbers of one type."""
    dtype = getattr(torch, part.dtype)
    piece = flat[part.first : part.stop]
    if dtype != flat.dtype and flat.dtype == torch.uint8 and len(piece) % dtype.itemsize == 0:
        piece = piece.clone().view(dtype)  # it may begin anywhere
    if piece.numel() != math.prod(part.shape):
        raise ValueError(f"{part.name} has {piece.numel()} numbers in its bucket, but the shape {part.shape}")
    if dtype != piece.dtype and not (dtype.is_floating_point and piece.dtype.is_floating_point):
        raise ValueError(f"{part.name} is {part.dtype}, but {dtype_name(piece.dtype)} in its bucket")
    return piece.to(dtype).view(part.shape)
