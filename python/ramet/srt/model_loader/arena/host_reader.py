"""Owns reading planned ranges of open files into an arena with several threads. Knows neither formats nor seeds."""

import os
from collections.abc import Callable, Sequence

import numpy as np

from ramet.srt.model_loader.arena.base import WeightArena
from ramet.srt.utils.threads import run_in_threads
from ramet.srt.weights.planner import CopyOp, split_op

READ_BYTES = 8 << 20  # one call's read: long enough to be efficient, short enough to share the work evenly
BLOCK_BYTES = 4 << 20  # buffer of a thread for rows that are gathered or converted
MIN_DIRECT_ROW_BYTES = 64 << 10  # rows at least this long are read one by one, without the bytes between them


class ShortReadError(OSError):
    """A file ended before a planned range did."""

    def __init__(self, fd_index: int) -> None:
        super().__init__("the file became shorter while it was read")
        self.fd_index = fd_index


def fill_from_files(ops: Sequence[CopyOp], fds: Sequence[int], target: WeightArena | memoryview) -> None:
    """Execute operations whose sources are open files: `op.source` is an index into `fds`.

    Raises:
        OSError: if a file can't be read or is shorter than planned.
    """
    if isinstance(target, memoryview):
        _fill_memory(ops, fds, target)
    elif target.device == "cuda":
        from ramet.srt.model_loader.arena.cuda_reader import fill_cuda_from_files

        fill_cuda_from_files(ops, fds, target)
    else:
        _fill_memory(ops, fds, target.memory)


def _fill_memory(ops: Sequence[CopyOp], fds: Sequence[int], memory: memoryview) -> None:
    """Fill host memory.

    Plain rows are read straight into `memory`; short strided rows and rows of another dtype go through
    a buffer of a few megabytes per thread.
    """

    def make_worker() -> Callable[[CopyOp], None]:
        buffer = bytearray()

        def run(op: CopyOp) -> None:
            if op.is_contiguous:
                read_range(fds, op.source, op.source_offset, memory[op.target_offset : op.target_stop])
            elif not op.source_dtype and op.row_nbytes >= MIN_DIRECT_ROW_BYTES:
                for row in range(op.num_rows):
                    start = op.target_offset + row * op.target_stride
                    source = op.source_offset + row * op.source_stride
                    read_range(fds, op.source, source, memory[start : start + op.row_nbytes])
            else:
                nonlocal buffer
                needed = (op.num_rows - 1) * op.source_stride + op.source_row_nbytes
                if len(buffer) < needed:
                    buffer = bytearray(needed)
                _read_rows(op, fds, memory, memoryview(buffer)[:needed])

        return run

    parts = [part for op in ops for part in _cut(op)]
    run_in_threads(parts, make_worker, "read-weights")


def _cut(op: CopyOp) -> list[CopyOp]:
    """Operations of at most READ_BYTES, or whose source bytes fit into a thread's buffer."""
    if op.is_contiguous or (not op.source_dtype and op.row_nbytes >= MIN_DIRECT_ROW_BYTES):
        return list(split_op(op, READ_BYTES))
    reach = max(op.source_stride, op.source_row_nbytes) / op.row_nbytes  # source bytes per target byte
    return list(split_op(op, max(1, int(BLOCK_BYTES / reach))))


def read_range(fds: Sequence[int], index: int, offset: int, into: memoryview) -> None:
    """Fill `into` from an offset of a file."""
    done = 0
    while done < len(into):
        count = os.preadv(fds[index], [into[done:]], offset + done)
        if count == 0:
            raise ShortReadError(index)
        done += count


def _read_rows(op: CopyOp, fds: Sequence[int], memory: memoryview, block: memoryview) -> None:
    """Read a span of the file that holds all rows, then copy or convert the rows out of it."""
    read_range(fds, op.source, op.source_offset, block)
    scatter_rows(op, memory, block)


def scatter_rows(op: CopyOp, memory: memoryview, block: memoryview) -> None:
    """Copy or convert the rows out of a block that starts with the first one."""
    if op.source_dtype:
        _convert_rows(op, memory, block)
        return
    shape = (op.num_rows, op.row_nbytes)
    source = np.ndarray(shape, np.uint8, block, strides=(op.source_stride, 1))
    target = np.ndarray(shape, np.uint8, memory, op.target_offset, strides=(op.target_stride, 1))
    np.copyto(target, source)


def _convert_rows(op: CopyOp, memory: memoryview, block: memoryview) -> None:
    import torch

    source_dtype, target_dtype = getattr(torch, op.source_dtype), getattr(torch, op.target_dtype)
    length = op.row_nbytes // target_dtype.itemsize

    def rows(buffer: memoryview, offset: int, dtype: "torch.dtype", stride: int) -> "torch.Tensor":
        span = (op.num_rows - 1) * stride // dtype.itemsize + length
        flat = torch.frombuffer(buffer, dtype=dtype, count=span, offset=offset)
        return flat.as_strided((op.num_rows, length), (stride // dtype.itemsize, 1))

    target = rows(memory, op.target_offset, target_dtype, op.target_stride)
    target.copy_(rows(block, 0, source_dtype, op.source_stride))
