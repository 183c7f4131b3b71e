"""Owns reading planned ranges of open files into a GPU's memory: through pinned buffers, copies beside the reads."""

from collections.abc import Callable, Sequence

import torch

from ramet.srt.model_loader import cuda_driver
from ramet.srt.model_loader.cuda_weight_arena import CudaWeightArena
from ramet.srt.model_loader.device_rows import scatter_device_rows
from ramet.srt.model_loader.sources.file_reader import BLOCK_BYTES, read_range
from ramet.srt.model_loader.threads import run_in_threads
from ramet.srt.model_loader.transfer_plan import CopyOp, split_op

PART_BYTES = 32 << 20  # of an operation, for one thread at a time
SLICE_BYTES = 2 << 20  # of a read: so small that the GPU takes it out of the processor's cache
NUM_SLICES = 4  # pinned buffers of a thread: some are copied from while the next is read into


def fill_cuda_from_files(ops: Sequence[CopyOp], fds: Sequence[int], arena: CudaWeightArena) -> None:
    """Execute operations whose sources are open files: `op.source` is an index into `fds`.

    Strided rows and rows of another dtype are sorted out on the GPU.

    Raises:
        OSError: if a file can't be read or is shorter than planned.
    """
    parts = [part for op in ops for part in _cut(op)]
    largest = max((op.source_span_nbytes for op in parts if not op.is_contiguous), default=0)

    def make_worker() -> Callable[[CopyOp], None]:
        torch.cuda.set_device(arena.torch_device)  # a thread starts with the first GPU
        torch.cuda.mem_get_info(arena.torch_device)  # binds its context, which calls into the driver need
        uploaders.append(_Uploader(fds, arena, largest))
        return uploaders[-1].run

    uploaders: list[_Uploader] = []  # their buffers must live until the last copy out of them is done
    try:
        run_in_threads(parts, make_worker, "read-weights")
    finally:
        arena.stream.synchronize()


def _cut(op: CopyOp) -> list[CopyOp]:
    if op.is_contiguous:
        return list(split_op(op, PART_BYTES))
    reach = max(op.source_stride, op.source_row_nbytes) / op.row_nbytes  # source bytes per target byte
    return list(split_op(op, max(1, int(BLOCK_BYTES / reach))))


class _Uploader:
    """One thread's pinned buffers.

    Args:
        rows_nbytes: room for the rows of an operation that is not contiguous.
    """

    def __init__(self, fds: Sequence[int], arena: CudaWeightArena, rows_nbytes: int):
        self.fds = fds
        self.arena = arena
        self.stream = arena.stream.cuda_stream
        self.slices = [_PinnedBuffer(SLICE_BYTES) for _ in range(NUM_SLICES)]
        self.rows = _PinnedBuffer(rows_nbytes)
        self.count = 0

    def run(self, op: CopyOp) -> None:
        if op.is_contiguous:
            self._upload(op)
        else:
            self._upload_rows(op)

    def _upload(self, op: CopyOp) -> None:
        target = self.arena.address + op.target_offset
        for start in range(0, op.row_nbytes, SLICE_BYTES):
            buffer = self.slices[self.count % NUM_SLICES]
            self.count += 1
            nbytes = min(SLICE_BYTES, op.row_nbytes - start)
            buffer.copied.synchronize()
            read_range(self.fds, op.source, op.source_offset + start, buffer.memory[:nbytes])
            cuda_driver.queue_upload(buffer.address, target + start, nbytes, self.stream)
            buffer.copied.record(self.arena.stream)

    def _upload_rows(self, op: CopyOp) -> None:
        buffer = self.rows
        buffer.copied.synchronize()
        read_range(self.fds, op.source, op.source_offset, buffer.memory[: op.source_span_nbytes])
        with torch.cuda.stream(self.arena.stream):
            source = buffer.tensor[: op.source_span_nbytes].to(self.arena.torch_device, non_blocking=True)
            buffer.copied.record()
            scatter_device_rows(op, source, self.arena.buffer)


class _PinnedBuffer:
    """Host memory that the GPU reads by itself; `copied` is done when its last copy is."""

    def __init__(self, nbytes: int):
        self.tensor = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        self.memory = memoryview(self.tensor.numpy())
        self.address = self.tensor.data_ptr()
        self.copied = torch.cuda.Event()
