"""Owns the memory of the KV cache and the table of each running request's pages, but not who gets which page."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch

from ramet.srt.batch.batch_plan import PageWrite, PlaceWrite
from ramet.srt.mem_cache.pool_memory import PoolMemory
from ramet.srt.utils.device import to_device

FP8 = torch.float8_e4m3fn
MAX_FP8 = torch.finfo(FP8).max


class ReqToPagePool:
    """What a rank keeps for each running request, by its row: the page numbers of its KV cache, its newest token.

    Row `size` belongs to nobody: its pages are page 0, and what pads a batch stands there.
    """

    def __init__(
        self,
        size: int,
        max_pages_per_req: int,
        device: torch.device,
        *,
        has_two_ropes: bool = False,
        num_mapped_pages: int | None = None,
        has_states: bool = False,
    ):
        """
        Args:
            num_mapped_pages: of the cache, where layers with a sliding window keep others of fewer.
            has_states: whether layers keep states, beside keys and values or in place of them.
            has_two_ropes: whether a sequence's length decides between two sets of rotary frequencies.
        """
        self.padding_row = size
        self.req_to_page = torch.zeros((size + 1, max_pages_per_req), dtype=torch.int64, device=device)
        self.last_tokens = torch.zeros(size + 1, dtype=torch.int64, device=device)
        self.is_long = torch.zeros(size + 1, dtype=torch.bool, device=device) if has_two_ropes else None

        # int64 [size + 1]: where the layers with a state keep each row's; 0 belongs to nobody.
        self.state_slots = torch.zeros(size + 1, dtype=torch.int64, device=device) if has_states else None

        # int64 [num_pages + 1]: the place of each page in layers with a window; 0: none, or one that nobody sees.
        self.window_map: torch.Tensor | None = None
        if num_mapped_pages is not None:
            self.window_map = torch.zeros(num_mapped_pages + 1, dtype=torch.int64, device=device)

    def place(self, writes: Sequence[PlaceWrite]) -> None:
        """Change the places of pages, as one step of the current stream."""
        if writes:
            assert self.window_map is not None
            pages = [page for write in writes for page in write.pages]
            places = [place for write in writes for place in write.places]
            changes = to_device([pages, places], torch.int64, self.window_map.device)
            self.window_map.index_copy_(0, changes[0], changes[1])

    def place_states(self, rows: Sequence[int], slots: Sequence[int]) -> None:
        """Say where the states of some rows are, as one step of the current stream."""
        assert self.state_slots is not None
        changes = to_device([list(rows), list(slots)], torch.int64, self.state_slots.device)
        self.state_slots.index_copy_(0, changes[0], changes[1])

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
    is_latent: bool = False  # values are the first `value_dim` columns of the keys, and are not kept beside them
    index_dim: int = 0  # columns of the key of a sparse index; 0: the layer has none

    @property
    def row_sizes(self) -> tuple[int, ...]:
        """Numbers of the parts that are kept apart: keys, values, the index's key."""
        keys = self.num_kv_heads * self.key_dim
        parts = (keys, 0 if self.is_latent else self.num_kv_heads * self.value_dim, self.index_dim)
        return tuple(part for part in parts if part)

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
        window_layers: Collection[int] = (),
        num_window_pages: int = 0,
    ):
        """
        Args:
            window_layers: ids of those that keep fewer pages, and so many.
            layers: of the rank, in the order of their ids.
            can_be_put_away: whether `put_away` will be called.

        Raises:
            MemoryError, OSError: if there is no memory that can be given back.
        """
        counts = [num_window_pages if index in window_layers else num_pages for index in range(len(layers))]
        num_slots = [(count + 1) * page_size for count in counts]
        sizes = [slots * size for slots, spec in zip(num_slots, layers, strict=True) for size in spec.row_sizes]
        self._memory = PoolMemory(sum(sizes) * dtype.itemsize, device, can_be_put_away=can_be_put_away)
        self.buffer = self._memory.bytes.view(dtype)
        self.page_size = page_size
        self.is_fp8 = dtype == FP8
        # Views, made once: every layer of every pass asks for its own.
        self._parts = self.buffer.split(sizes)
        self._row_sizes = [size for spec in layers for size in spec.row_sizes]  # numbers of a token in each of them
        self.layout = f"{page_size} tokens of {', '.join(map(str, self._row_sizes))} {str(dtype).split('.')[-1]}"
        parts = iter(self._parts)
        self._layers: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._index_keys: dict[int, torch.Tensor] = {}
        for layer_id, (spec, slots) in enumerate(zip(layers, num_slots, strict=True)):
            self._layers.append(_layer_views(spec, parts, slots))
            if spec.index_dim:
                self._index_keys[layer_id] = next(parts).view(slots, spec.index_dim)

    @property
    def is_put_away(self) -> bool:
        """See PoolMemory."""
        return self._memory.is_put_away

    def put_away(self) -> None:
        """See PoolMemory."""
        self._memory.put_away()

    def take_back(self) -> None:
        """See PoolMemory."""
        self._memory.take_back()

    def get_kv_buffer(self, layer_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer: views [num_slots, num_kv_heads, key_dim] and [..., value_dim]."""
        return self._layers[layer_id]

    def get_index_keys(self, layer_id: int) -> torch.Tensor:
        """[num_slots, index_dim]: of a layer with a sparse index."""
        return self._index_keys[layer_id]

    @property
    def page_nbytes(self) -> int:
        """Of a page in all layers, where all keep everything."""
        return self.page_size * sum(self._row_sizes) * self.buffer.itemsize

    def read_pages(self, pages: Sequence[int]) -> bytes:
        """The content of pages, part by part, where all layers keep everything. Waits for the current stream."""
        index = to_device(list(pages), torch.int64, self.buffer.device)
        return torch.cat([part.index_select(0, index).view(-1) for part in self._paged_parts()]).cpu().numpy().tobytes()

    def write_pages(self, pages: Sequence[int], data: bytes) -> None:
        """Put what `read_pages` has read, here or in another pool of the same layout, into other pages."""
        index = to_device(list(pages), torch.int64, self.buffer.device)
        content = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        parts = self._paged_parts()
        sizes = [len(pages) * part.shape[1] for part in parts]
        for part, new in zip(parts, content.split(sizes), strict=True):
            part.index_copy_(0, index, new.view(len(pages), -1).to(part.device))

    def _paged_parts(self) -> list[torch.Tensor]:
        """Each part's bytes by its pages: uint8 [num_pages + 1, bytes of a page]."""
        sizes = [self.page_size * size * self.buffer.itemsize for size in self._row_sizes]
        return [part.view(torch.uint8).view(-1, size) for part, size in zip(self._parts, sizes, strict=True)]

    def set_kv_buffer(
        self, layer_id: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scales: torch.Tensor | None = None
    ) -> None:
        """Write k and v, [num_tokens, num_kv_heads, key_dim or value_dim], to `slots` int64 [num_tokens].

        Args:
            scales: float32 [2], of an fp8 cache: what keys and values are divided by. What is beyond its largest
                number becomes that.
        """
        for place, (cache, new) in enumerate(zip(self._layers[layer_id], (k, v), strict=True)):
            if self.is_fp8:
                numbers = new.float() if scales is None else new.float() / scales[place]
                # As bytes: torch has no index_copy_ of fp8 on CPUs.
                cache, new = cache.view(torch.uint8), numbers.clamp_(-MAX_FP8, MAX_FP8).to(FP8).view(torch.uint8)
            cache.index_copy_(0, slots, new)


def _layer_views(spec: KVSpec, parts: Iterator[torch.Tensor], num_slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a layer, of the parts of a buffer from its own on."""
    keys = next(parts).view(num_slots, spec.num_kv_heads, spec.key_dim)
    if spec.is_latent:
        return keys, keys[..., : spec.value_dim]
    return keys, next(parts).view(num_slots, spec.num_kv_heads, spec.value_dim)
