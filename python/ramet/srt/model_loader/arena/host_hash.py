"""Owns the checksums of parts of an arena in host memory."""

from collections.abc import Iterator

import numpy as np

BLOCK_BYTES = 4 << 20  # rows that are gathered before they are hashed


def _rows(memory: memoryview, start: int, row_nbytes: int, num_rows: int, stride: int) -> Iterator[memoryview]:
    """Rows one after the other, gathered into blocks."""
    step = max(1, BLOCK_BYTES // max(stride, row_nbytes, 1))
    for first in range(0, num_rows, step):
        count = min(step, num_rows - first)
        begin = start + first * stride
        span = memory[begin : begin + (count - 1) * stride + row_nbytes]
        if count == 1:
            yield span
        else:
            rows = np.ndarray((count, row_nbytes), np.uint8, span, strides=(stride, 1))
            yield memoryview(np.ascontiguousarray(rows)).cast("B")
