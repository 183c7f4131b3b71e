"""Owns how the memory of a KV cache is shared by layers that keep everything and layers that keep their window."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ramet.srt.mem_cache.memory_pool import KVSpec

CACHED_SHARE = 8  # of so many pages, one has its place in the layers with a window, for prefixes to be found again


@dataclass(frozen=True)
class KVLayers:
    """What the layers of a rank keep."""

    specs: Sequence[KVSpec]  # by their ids
    windows: Sequence[int | None]  # the same
    dtype: torch.dtype
    may_differ: bool  # whether attention can find the keys of some layers elsewhere

    def page_bytes(self, page_size: int, layer_ids: frozenset[int]) -> tuple[int, int]:
        """Of a page in other layers, and in those."""
        sizes = [page_size * spec.bytes_per_token(self.dtype) for spec in self.specs]
        inside = sum(sizes[index] for index in layer_ids)
        return sum(sizes) - inside, inside


def window_pages(num_pages: int, num_needed: int) -> int:
    """Pages of the layers with a window, beside so many of the others.

    Args:
        num_needed: by all requests that run, and what a pass computes.
    """
    return min(num_pages, max(num_needed, num_pages // CACHED_SHARE))


def most_pages(num_bytes: int, full_page_bytes: int, window_page_bytes: int, num_needed: int) -> int | None:
    """The most pages whose keys and values fit; None if there is no limit.

    Args:
        full_page_bytes, window_page_bytes: of a page in all layers of a kind.
    """

    def size(num_pages: int) -> int:
        return num_pages * full_page_bytes + window_pages(num_pages, num_needed) * window_page_bytes

    if full_page_bytes + window_page_bytes == 0:
        return None
    low, high = 0, 1
    while size(high) <= num_bytes:
        low, high = high, 2 * high
        if low >= 1 << 40:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) <= num_bytes else (low, middle)
    return low
