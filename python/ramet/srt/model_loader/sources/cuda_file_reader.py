"""Owns reading planned ranges of open files into a GPU's memory: through pinned buffers, copies beside the reads."""

from collections.abc import Callable, Sequence

import torch

from ramet.srt.model_loader.cuda_weight_arena import CudaWeightArena
from ramet.srt.model_loader.device_rows import scatter_device_rows
from ramet.srt.model_loader.sources.file_reader import BLOCK_BYTES, read_range
from ramet.srt.model_loader.threads import run_in_threads
from ramet.srt.model_loader.transfer_plan import CopyOp, split_op

READ_BYTES = 16 << 20  # long enough that Python's work between two reads doesn't count
NUM_BUFFERS = 2  # per thread: one is read into while the other is copied out of


def fill_cuda_from_files(ops: Sequence[CopyOp], fds: Sequence[int], arena: CudaWeightArena) -> None:
    """Execute operations whose sources are open files: `op.source` is an index into `fds`.

    Strided rows and rows of another dtype are sorted out on the GPU.

    Raises:
        OSError: if a file can't be read or is shorter than planned.
    """
    parts = [part for op in ops for part in _cut(op)]
    largest = max((op.source_span_nbytes for op in parts), default=0)

    def make_worker() -> Callable[[CopyOp], None]:
        torch.cuda.set_device(arena.torch_device)  # a thread starts with the first GPU
        return _Uploader(fds, arena, largest).run

    run_in_threads(parts, make_worker, "read-weights")
    arena.stream.synchronize()


def _cut(op: CopyOp) -> list[CopyOp]:
    if op.is_contiguous:
        return list(split_op(op, READ_BYTES))
    reach = max(op.source_stride, op.source_row_nbytes) / op.row_nbytes  # source bytes per target byte
    return list(split_op(op, max(1, int(BLOCK_BYTES / reach))))


class _Uploader:
    """One thread's pinned buffers."""

    def __init__(self, fds: Sequence[int], arena: CudaWeightArena, nbytes: int):
        self.fds = fds
        self.arena = arena
        self.buffers = [torch.empty(nbytes, dtype=torch.uint8, pin_memory=True) for _ in range(NUM_BUFFERS)]
        self.copied = [torch.cuda.Event() for _ in range(NUM_BUFFERS)]
        self.count = 0

    def run(self, op: CopyOp) -> None:
        place = self.count % NUM_BUFFERS
        self.count += 1
        self.copied[place].synchronize()
        source = self.buffers[place][: op.source_span_nbytes]
        read_range(self.fds, op.source, op.source_offset, memoryview(source.numpy()))
        with torch.cuda.stream(self.arena.stream):
            if op.is_contiguous:
                self.arena.buffer[op.target_offset : op.target_stop].copy_(source, non_blocking=True)
            else:
                scatter_device_rows(op, source.to(self.arena.torch_device, non_blocking=True), self.arena.buffer)
            self.copied[place].record()
