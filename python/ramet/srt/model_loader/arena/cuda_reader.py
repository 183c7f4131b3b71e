"""Owns reading planned ranges of open files into a GPU's memory: through pinned buffers, copies beside the reads.

Two things limit it, and shape it. The processor's memory: the slices of all threads together are so small that the GPU
takes them out of the cache, so bytes pass through memory once, when they are read, and not also when they are written
and fetched. Python's lock: a slice costs one system call, in which the lock is free, and keeps it for the rest, as each
hand-over makes other threads wait; together some 80 µs, so that slices must not be too small (docs/benchmarks.md).
"""

import functools
from collections import deque
from collections.abc import Callable, Sequence

import torch

from ramet.srt.model_loader.arena.cuda_rows import scatter_device_rows
from ramet.srt.model_loader.arena.read_range import BLOCK_BYTES, read_range
from ramet.srt.observability.progress_bar import BYTES, progress_bar
from ramet.srt.utils import cuda_driver
from ramet.srt.utils.threads import num_copy_threads, run_in_threads
from ramet.srt.weights.copy_op import CopyOp, split_by_source, split_op

PART_BYTES = 16 << 20  # of an operation, for one thread at a time
SLICE_BYTES = 4 << 20  # of a read and of a copy
SPARE_SLICES = 4  # beyond one for each thread: those that the GPU copies from meanwhile
MAX_READERS = 12  # threads; more of them slow each other down


def fill_cuda_from_files(
    ops: Sequence[CopyOp], fds: Sequence[int], memory: torch.Tensor, stream: torch.cuda.Stream
) -> None:
    """Execute operations whose sources are open files: `op.source` is an index into `fds`.

    Strided rows and rows of another dtype are sorted out on the GPU.

    Args:
        memory: what they write to: uint8, 1-D, on a GPU.
        stream: on which all copies run; they are done when this returns.

    Raises:
        OSError: if a file can't be read or is shorter than planned.
    """
    parts = [part for op in ops for part in _cut(op)]
    if not parts:
        return
    largest = max((op.source_span_nbytes for op in parts if not op.is_contiguous), default=0)
    num_threads = min(num_copy_threads(MAX_READERS), len(parts))
    ring = _Ring(num_threads + SPARE_SLICES)
    readers: list[_Reader] = []  # their buffers must live until the last copy out of them is done

    def make_worker() -> Callable[[CopyOp], None]:
        torch.cuda.set_device(memory.device)  # a thread starts with the first GPU
        torch.cuda.mem_get_info(memory.device)  # binds its context, which calls into the driver need
        readers.append(_Reader(fds, memory, stream, ring, largest))
        read = readers[-1].run

        def run(op: CopyOp) -> None:
            read(op)
            advance(op.nbytes)

        return run

    try:
        with progress_bar(sum(part.nbytes for part in parts), "reading weights", **BYTES) as advance:
            run_in_threads(parts, make_worker, "read-weights", num_threads)
    finally:
        stream.synchronize()


def _cut(op: CopyOp) -> list[CopyOp]:
    return list(split_op(op, PART_BYTES) if op.is_contiguous else split_by_source(op, BLOCK_BYTES))


class _PinnedBuffer:
    """Host memory that the GPU reads by itself; `copied` is done when its last copy is."""

    def __init__(self, nbytes: int) -> None:
        self.tensor = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        self.memory = self.tensor.numpy().data
        self.address = self.tensor.data_ptr()
        self.copied = torch.cuda.Event()
        self.copied.record()  # makes it

    def wait(self) -> None:
        """Until it can be written again."""
        if not self.copied.query():  # which keeps Python's lock; waiting gives it away
            self.copied.synchronize()


class _Ring:
    """Pinned slices, in the order in which the GPU is done with them. All threads take from it."""

    def __init__(self, num_slices: int) -> None:
        self._unmade = deque(range(num_slices))  # pinning takes milliseconds: threads do it side by side
        self._free: deque[_PinnedBuffer] = deque()

    def take(self) -> _PinnedBuffer:
        """The slice whose copy was queued first; there are more of them than threads."""
        try:
            self._unmade.pop()
        except IndexError:
            buffer = self._free.popleft()
            buffer.wait()
            return buffer
        return _PinnedBuffer(SLICE_BYTES)

    def give_back(self, buffer: _PinnedBuffer) -> None:
        """After its copy has been queued and `copied` recorded."""
        self._free.append(buffer)


class _Reader:
    """What one thread does.

    Args:
        rows_nbytes: room for the rows of an operation that is not contiguous.
    """

    def __init__(
        self, fds: Sequence[int], memory: torch.Tensor, stream: torch.cuda.Stream, ring: _Ring, rows_nbytes: int
    ) -> None:
        self.fds = fds
        self.memory = memory
        self.stream = stream
        self.ring = ring
        self.rows_nbytes = rows_nbytes

    @functools.cached_property
    def rows(self) -> _PinnedBuffer:
        return _PinnedBuffer(self.rows_nbytes)

    def run(self, op: CopyOp) -> None:
        if op.is_contiguous:
            self._upload(op)
        else:
            self._upload_rows(op)

    def _upload(self, op: CopyOp) -> None:
        target, stream = self.memory.data_ptr() + op.target_offset, self.stream
        for start in range(0, op.row_nbytes, SLICE_BYTES):
            nbytes = min(SLICE_BYTES, op.row_nbytes - start)
            buffer = self.ring.take()
            read_range(self.fds, op.source, op.source_offset + start, buffer.memory[:nbytes])
            cuda_driver.queue_upload(buffer.address, target + start, nbytes, stream.cuda_stream)
            cuda_driver.record_event(buffer.copied.cuda_event, stream.cuda_stream)
            self.ring.give_back(buffer)

    def _upload_rows(self, op: CopyOp) -> None:
        buffer = self.rows
        buffer.wait()
        read_range(self.fds, op.source, op.source_offset, buffer.memory[: op.source_span_nbytes])
        with torch.cuda.stream(self.stream):
            source = buffer.tensor[: op.source_span_nbytes].to(self.memory.device, non_blocking=True)
            buffer.copied.record()
            scatter_device_rows(op, source, self.memory)
