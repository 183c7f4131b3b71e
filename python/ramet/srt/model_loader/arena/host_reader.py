"""Owns reading planned ranges of open files into host memory with several threads. Knows neither formats nor seeds."""

from collections.abc import Callable, Sequence

from ramet.srt.model_loader.arena.host_rows import scatter_rows
from ramet.srt.model_loader.arena.read_range import BLOCK_BYTES, read_range
from ramet.srt.observability.progress_bar import BYTES, progress_bar
from ramet.srt.utils.threads import run_in_threads
from ramet.srt.weights.copy_op import CopyOp, split_by_source, split_op

READ_BYTES = 8 << 20  # one call's read: long enough to be efficient, short enough to share the work evenly
MIN_DIRECT_ROW_BYTES = 64 << 10  # rows at least this long are read one by one, without the bytes between them


def fill_memory_from_files(ops: Sequence[CopyOp], fds: Sequence[int], memory: memoryview) -> None:
    """Execute operations whose sources are open files: `op.source` is an index into `fds`.

    Plain rows are read straight into `memory`; short strided rows and rows of another dtype go through
    a buffer of a few megabytes per thread.

    Raises:
        OSError: if a file can't be read or is shorter than planned.
    """

    parts = [part for op in ops for part in _cut(op)]

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
                if len(buffer) < op.source_span_nbytes:
                    buffer = bytearray(op.source_span_nbytes)
                _read_rows(op, fds, memory, memoryview(buffer)[: op.source_span_nbytes])
            advance(op.nbytes)

        return run

    with progress_bar(sum(part.nbytes for part in parts), "reading weights", **BYTES) as advance:
        run_in_threads(parts, make_worker, "read-weights")


def _cut(op: CopyOp) -> list[CopyOp]:
    """Operations of at most READ_BYTES, or whose source bytes fit into a thread's buffer."""
    if op.is_contiguous or (not op.source_dtype and op.row_nbytes >= MIN_DIRECT_ROW_BYTES):
        return list(split_op(op, READ_BYTES))
    return list(split_by_source(op, BLOCK_BYTES))


def _read_rows(op: CopyOp, fds: Sequence[int], memory: memoryview, block: memoryview) -> None:
    """Read a span of the file that holds all rows, then copy or convert the rows out of it."""
    read_range(fds, op.source, op.source_offset, block)
    scatter_rows(op, memory, block)
