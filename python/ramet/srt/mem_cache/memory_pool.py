"""Owns the memory of the KV cache and the table of each running request's pages, but not who gets which page."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ramet.srt.batch.batch_plan import PageWrite
from ramet.srt.utils.device import to_device
from ramet.srt.utils.returnable_zeros import ReturnableZeros


class ReqToPagePool:
    """What a rank keeps for each running request, by its row: the page numbers of its KV cache, its newest token.

    Row `size` belongs to nobody: its pages are page 0, and what pads a batch stands there.
    """

    def __init__(self, size: int, max_pages_per_req: int, device: torch.device, *, has_two_ropes: bool = False):
        """
        Args:
            has_two_ropes: whether a sequence's length decides between two sets of rotary frequencies.
        """
        self.padding_row = size
        self.req_to_page = torch.zeros((size + 1, max_pages_per_req), dtype=torch.int64, device=device)
        self.last_tokens = torch.zeros(size + 1, dtype=torch.int64, device=device)
        self.is_long = torch.zeros(size + 1, dtype=torch.bool, device=device) if has_two_ropes else None

    def write(self, writes: Sequence[PageWrite]) -> None:
        """Change the table, in order, as one step of the current stream."""
        width = self.req_to_page.shape[1]
        changes: dict[int, int] = {}  # a later write of the same place replaces an earlier one
        for write in writes:
            first = write.row * width + write.start
            changes.update(zip(range(first, first + len(write.pages)), write.pages, strict=True))
        if changes:
            places, pages = to_device([list(changes), list(changes.values())], torch.int64, self.req_to_page.device)
            self.req_to_page.view(-1).index_copy_(0, places, pages)
        if self.is_long is not None and writes:
            lengths = {write.row: write.is_long for write in writes}
            rows, is_long = to_device([list(lengths), list(lengths.values())], torch.int64, self.is_long.device)
            self.is_long.index_copy_(0, rows, is_long.bool())


@dataclass(frozen=True)
class KVSpec:
    """What a layer keeps of each token."""

    num_kv_heads: int
    key_dim: int
    value_dim: int
    is_latent: bool = False  # values are the first `value_dim` columns of the keys, and nothing else is kept

    @property
    def row_sizes(self) -> tuple[int, ...]:
        """Numbers of the parts that are kept apart: keys, and values."""
        keys = self.num_kv_heads * self.key_dim
        return (keys,) if self.is_latent else (keys, self.num_kv_heads * self.value_dim)

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        return sum(self.row_sizes) * dtype.itemsize


class TokenToKVPool:
    """Keys and values of all layers, addressed by slot = page * page_size + position in the page.

    Page 0 belongs to nobody: padded reads and writes go there.
    """

    def __init__(
        self,
        *,
        num_pages: int,
        page_size: int,
        layers: Sequence[KVSpec],
        dtype: torch.dtype,
        device: torch.device,
        can_be_put_away: bool = False,
    ):
        """
        Args:
            layers: of the rank, in the order of their ids.
            can_be_put_away: whether `put_away` will be called.

        Raises:
            MemoryError, OSError: if there is no memory that can be given back.
        """
        num_slots = (num_pages + 1) * page_size
        shape = (sum(num_slots * size for spec in layers for size in spec.row_sizes),)
        self._memory = ReturnableZeros(math.prod(shape) * dtype.itemsize, device) if can_be_put_away else None
        if self._memory is not None:
            self.buffer = self._memory.tensor.view(dtype).view(*shape)
        elif device.type == "cpu":
            self.buffer = _lazy_zeros(shape, dtype)
        else:
            self.buffer = torch.zeros(shape, dtype=dtype, device=device)
        self.page_size = page_size
        # Views, made once: every layer of every pass asks for its own.
        parts = iter(self.buffer.split([num_slots * size for spec in layers for size in spec.row_sizes]))
        self._layers = [_layer_views(spec, parts, num_slots) for spec in layers]

    @property
    def is_put_away(self) -> bool:
        """Whether there is no memory at the addresses."""
        return self._memory is not None and not self._memory.is_there

    def put_away(self) -> None:
        """Give the memory back; the addresses stay, and nobody may read them. Does nothing if there is none.

        Raises:
            RuntimeError: if it can't be given back.
        """
        if self._memory is None:
            raise RuntimeError("the memory of the KV cache can only be given back with --enable-memory-saver")
        self._memory.give_back()

    def take_back(self) -> None:
        """Have memory at the addresses again, all zeros. Does nothing if there is some.

        Raises:
            MemoryError: if there is not enough; nothing has changed then.
        """
        if self._memory is not None:
            self._memory.take()

    def get_kv_buffer(self, layer_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer: views [num_slots, num_kv_heads, key_dim] and [..., value_dim]."""
        return self._layers[layer_id]

    def set_kv_buffer(self, layer_id: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write k and v, [num_tokens, num_kv_heads, key_dim or value_dim], to `slots` int64 [num_tokens]."""
        keys, values = self._layers[layer_id]
        keys.index_copy_(0, slots, k)
        values.index_copy_(0, slots, v)


def _layer_views(spec: KVSpec, parts: Iterator[torch.Tensor], num_slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a layer, of the parts of a buffer from its own on."""
    keys = next(parts).view(num_slots, spec.num_kv_heads, spec.key_dim)
    if spec.is_latent:
        return keys, keys[..., : spec.value_dim]
    return keys, next(parts).view(num_slots, spec.num_kv_heads, spec.value_dim)


def _lazy_zeros(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Zeros on the host that take memory only where something is written; torch.zeros writes all of them."""
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(*shape)
