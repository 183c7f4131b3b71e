"""Owns the checksums of what an arena in host memory holds: whole entries, samples of them, and rows that lie apart."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from ramet.srt.utils.threads import num_copy_threads
from ramet.srt.weights.manifest import WeightEntry

if TYPE_CHECKING:
    import torch

BLOCK_BYTES = 4 << 20  # rows that are gathered before they are hashed
SAMPLE_BYTES = 4096  # of each of the first, middle and last block of an entry


def hash_entries(entries: Sequence[WeightEntry], memory: memoryview) -> tuple[str, ...]:
    """The checksum of all bytes of each entry, with several threads."""

    def run(entry: WeightEntry) -> str:
        return xxhash.xxh3_64_hexdigest(memory[entry.offset : entry.offset + entry.nbytes])

    # The hash runs without the GIL. Large entries go first, so that no thread is left with one at the end.
    order = sorted(range(len(entries)), key=lambda i: -entries[i].nbytes)
    with ThreadPoolExecutor(num_copy_threads(), thread_name_prefix="checksum") as pool:
        hashed = dict(zip(order, pool.map(run, [entries[i] for i in order]), strict=True))
    return tuple([hashed[i] for i in range(len(entries))])


def hash_samples(entries: Sequence[WeightEntry], memory: memoryview) -> tuple[str, ...]:
    """The checksum of three blocks of each entry: so few bytes that threads would take longer to start."""
    return tuple([_hash_sample(memory[entry.offset : entry.offset + entry.nbytes]) for entry in entries])


def hash_rows(memory: memoryview, starts: Sequence[int], row_nbytes: int, num_rows: int, stride: int) -> str:
    """The checksum of rows one behind the other: of `num_rows` from each of `starts` on, `stride` bytes apart."""
    digest = xxhash.xxh3_64()
    for start in starts:
        for block in _rows(memory, start, row_nbytes, num_rows, stride):
            digest.update(block)
    return digest.hexdigest()


def hash_content(content: "torch.Tensor") -> str:
    """The checksum of all bytes of a contiguous tensor."""
    import torch

    return xxhash.xxh3_64_hexdigest(content.view(-1).view(torch.uint8).numpy().data)


def _hash_sample(data: memoryview) -> str:
    if data.nbytes <= 3 * SAMPLE_BYTES:
        return xxhash.xxh3_64_hexdigest(data)
    middle = data.nbytes // 2
    digest = xxhash.xxh3_64(data[:SAMPLE_BYTES])
    digest.update(data[middle : middle + SAMPLE_BYTES])
    digest.update(data[-SAMPLE_BYTES:])
    return digest.hexdigest()


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
            yield np.ascontiguousarray(rows).data.cast("B")
