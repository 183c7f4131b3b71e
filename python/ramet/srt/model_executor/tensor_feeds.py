"""Owns how a rank gets the tensors of one call of an update. What becomes of them is TensorStage's."""

import contextlib
import os
from collections.abc import Generator
from typing import TypeAlias

import torch

from ramet.srt.model_loader.arena.read_range import ShortReadError, read_range
from ramet.srt.model_loader.checkpoint.file_stamps import check_stamps, file_stamp
from ramet.srt.model_loader.checkpoint.safetensors_header import read_header
from ramet.srt.weights.update_messages import TensorsInFile, TensorsSource

Tensors: TypeAlias = Generator[tuple[str, torch.Tensor], None, None]


class TensorFeeds:
    """A rank's ways to tensors, one for each type of TensorsSource, and what they keep between calls.

    Whoever adds a source adds a message to TensorsSource (weights/update_messages.py), which `PutTensorsReq` carries to
    every rank of every replica, and a case to `open` and to `name_of`. Nothing else is needed: the main process hands
    the message to `WeightSessions.put` (managers/weight_sessions.py), with or without a session around.

    `open` gives a generator over (name, tensor):

    - names as checkpoints of the model have them, in any spelling that is read from files (fused, stacked, with or
      without prefix); the order is free, and no tensor may come twice between the begin and the end of a session;
    - tensors whole, not sharded, in a type that a file might have, on the host or on the arena's device, where their
      bytes must have arrived: whoever receives on a stream waits for it before the yield;
    - a tensor is done with when the next one is asked for: its memory may be used again from then on.

    It runs in the thread of the rank's updates, where the arena's device is current, beside passes, on all ranks at the
    same time, and is run to its end. If a tensor is refused, all ranks refuse it, and the generator is closed at that
    yield: where others wait until everything is taken, `finally` is the place to take the rest. What it raises
    (ValueError, OSError, RuntimeError, TimeoutError) with a line for people ends the update, and what serves is
    untouched. It must not wait for ever.
    """

    def open(self, source: TensorsSource) -> Tensors:
        """The tensors of a call."""
        return _read_file(source)

    def name_of(self, _source: TensorsSource) -> str:
        """What load reports and answers call such a source."""
        return "file"


def _read_file(source: TensorsInFile) -> Tensors:
    check_stamps(source.path, [file_stamp(source.path)], [source.stamp], source.host_identity)
    tensors = read_header(source.path)
    with contextlib.ExitStack() as stack:
        fd = os.open(source.path, os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, fd)
        for name, info in tensors.items():
            content = torch.empty(info.nbytes, dtype=torch.uint8)
            try:
                read_range([fd], 0, info.offset, content.numpy().data)
            except ShortReadError as error:
                raise ValueError(f"{source.path} is truncated: {error}") from error
            yield name, content.view(getattr(torch, info.dtype)).view(info.shape)
    check_stamps(source.path, [file_stamp(source.path)], [source.stamp], source.host_identity)
