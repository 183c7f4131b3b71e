"""Owns attention with Ramet's Triton kernels: how a pass is cut into pieces, and where the kernels find them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from ramet.srt.batch.forward_batch_info import ForwardBatch
from ramet.srt.batch.pass_tokens import PassTokens
from ramet.srt.layers.attention.base_attn_backend import (
    AttentionBackend,
    AttentionLayer,
    AttentionSpec,
    CapturedShape,
    PassLimits,
)
from ramet.srt.layers.attention.key_splits import (
    LARGE_SLOTS,
    PIECE_FIELDS,
    SLOTS,
    Capacity,
    KeySplits,
    KeySplitter,
    Tile,
)
from ramet.srt.layers.attention.prompts.base import PromptAttention, PromptChunks
from ramet.srt.layers.attention.prompts.choice import PromptChoice, RunPrompts
from ramet.srt.layers.kernels.paged_attention import PieceLists, TileShape, large_tile, paged_attention, small_tile
from ramet.srt.layers.kernels.runtime import can_run_kernels, has_fp8_units, num_multiprocessors
from ramet.srt.mem_cache.memory_pool import TokenToKVPool
from ramet.srt.utils.device import to_device

Window = int | None

ALIGNMENT = 4  # int32 numbers, 16 bytes
MIN_PROMPT_TOKENS = 256  # of chunks in a pass, for which other kernels are asked
# From here on, in tokens and in pairs of query and key, other kernels save more than a graph, which holds only Ramet's.
LAUNCHED_TOKENS, LAUNCHED_PAIRS = 1024, 8 << 20


class _Captured(NamedTuple):
    """What the kernels of a captured pass read."""

    sizes: list[Capacity]  # for each window
    packed: torch.Tensor
    pieces: dict[Window, PieceLists]  # views of it


class Tiling(NamedTuple):
    """How programs share the work."""

    small: TileShape
    large: TileShape
    group: int  # query heads of a tile, which have the same keys
    num_groups: int
    programs: tuple[int, int] = (SLOTS, LARGE_SLOTS)  # that a multiprocessor runs at a time, of each kind


class TritonAttnBackend(AttentionBackend):
    """Reads keys and values where they lie; nothing is gathered. The pieces of a pass are listed on the host."""

    can_be_captured = True
    can_capture_chunks = True
    applies_kv_scales = True

    def __init__(self, spec: AttentionSpec, kv_pool: TokenToKVPool):
        super().__init__(spec, kv_pool)
        self._tiling = tiling = self._choose_tiles()
        tiles = Tile(tiling.small.rows, tiling.group), Tile(tiling.large.rows, tiling.group)
        sizes = tiling.num_groups, num_multiprocessors(spec.device)
        self._splitters = [KeySplitter(*tiles, *sizes, window, tiling.programs) for window in spec.windows]
        self._captured: dict[CapturedShape, _Captured] = {}
        self._current: dict[Window, PieceLists]  # of the pass
        self._choice: PromptChoice | None = None  # of the kernels for long passes, once there has been a quiet moment
        self._prompts: PromptAttention | None = None  # what computes the chunks of this pass; None: Ramet's kernels

    def _choose_tiles(self) -> Tiling:
        spec, group = self.spec, self.spec.num_heads // self.spec.num_kv_heads
        small, large = (tile(spec.dtype, spec.head_dim, group) for tile in (small_tile, large_tile))
        return Tiling(small, large, group, spec.num_kv_heads)

    @staticmethod
    def obstacle(spec: AttentionSpec) -> str | None:
        if not can_run_kernels(spec.device):
            return "a GPU"
        if spec.has_fp8_cache and spec.device.type == "cuda" and not has_fp8_units(spec.device):
            return "a GPU of compute capability 8.9 or more for a KV cache in fp8"
        return None

    @staticmethod
    def maps_windows(spec: AttentionSpec) -> bool:
        """Where no other kernels would compute prompts: those find all layers' keys by one table."""
        return spec.has_sinks or spec.soft_cap is not None or spec.has_fp8_cache

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        if forward_batch.is_captured:
            return  # cut already: that is done on the host
        tokens = forward_batch.tokens
        is_chunk = self._splitters[0].is_chunk(tokens)
        self._prompts = None
        if self._choice is not None and tokens.lens[is_chunk].sum() >= MIN_PROMPT_TOKENS:
            self._prompts = self._choice.chosen
        if self._prompts is not None:
            fields = (tokens.rows, tokens.first_tokens[:-1], tokens.lens, tokens.ends)
            self._prompts.plan(PromptChunks(*(field[is_chunk] for field in fields)), forward_batch.req_to_page)
        self._cut(tokens, with_chunks=self._prompts is None)

    def _cut(self, tokens: PassTokens, with_chunks: bool) -> None:
        splits = [splitter.split(tokens, with_chunks) for splitter in self._splitters]
        sizes = [Capacity(len(one.small), len(one.large), int(one.starts[-1])) for one in splits]
        packed = to_device(_pack(splits, sizes, tokens.num_tokens), torch.int32, self.spec.device)
        self._current = self._unpack(packed, sizes, tokens.num_tokens)

    def init_cuda_graph_state(self, shapes: Sequence[CapturedShape], _req_to_page: torch.Tensor) -> None:
        for shape in shapes:
            sizes = [splitter.capacity(shape.num_tokens, shape.has_chunks) for splitter in self._splitters]
            length = sum(_packed_size(size, shape.num_tokens) for size in sizes)
            packed = torch.zeros(length, dtype=torch.int32, device=self.spec.device)
            self._captured[shape] = _Captured(sizes, packed, self._unpack(packed, sizes, shape.num_tokens))

    def init_forward_metadata_replay_cuda_graph(
        self, shape: CapturedShape, tokens: PassTokens, _rows: torch.Tensor
    ) -> None:
        captured = self._captured[shape]
        splits = [splitter.split(tokens, shape.has_chunks) for splitter in self._splitters]
        packed = torch.from_numpy(_pack(splits, captured.sizes, shape.num_tokens))
        captured.packed.copy_(packed.pin_memory() if captured.packed.is_cuda else packed, non_blocking=True)
        self._current = captured.pieces
        self._prompts = None

    def forward(self, q: torch.Tensor, layer: AttentionLayer, forward_batch: ForwardBatch) -> torch.Tensor:
        k_cache, v_cache = self.kv_pool.get_kv_buffer(layer.layer_id)
        window_map = None if layer.sliding_window is None else forward_batch.window_map
        out = self._attend(q, k_cache, v_cache, forward_batch.req_to_page, forward_batch.positions, layer, window_map)
        if self._prompts is not None:
            self._prompts.run(q, k_cache, v_cache, layer.sliding_window, out)
        return out

    def _attend(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        table: torch.Tensor,
        positions: torch.Tensor,
        layer: AttentionLayer,
        page_map: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return paged_attention(
            q,
            k_cache,
            v_cache,
            table,
            positions,
            self._current[layer.sliding_window],
            self._tiling.small,
            self._tiling.large,
            page_size=self.spec.page_size,
            scale=self.spec.scale,
            sliding_window=layer.sliding_window,
            soft_cap=self.spec.soft_cap,
            kv_scales=layer.kv_scales,
            sinks=layer.sinks,
            page_map=page_map,
        )

    def prefers_launches(self, tokens: PassTokens) -> bool:
        if self._choice is None or self._choice.chosen is None or tokens.num_tokens < LAUNCHED_TOKENS:
            return False
        return int((tokens.lens * (tokens.starts + tokens.ends)).sum()) // 2 >= LAUNCHED_PAIRS

    def use_quiet_moment(self, limits: PassLimits) -> None:
        if self._choice is None and self.spec.soft_cap is None:  # which no other has
            # It has a backend of its own: its thread must not touch the pass that this one is at.
            self._choice = PromptChoice(self.spec, limits, TritonAttnBackend(self.spec, self.kv_pool).plan_prompts)

    def plan_prompts(self, chunks: PromptChunks, table: torch.Tensor) -> RunPrompts:
        """Have these kernels compute the chunks, whatever others there are; see PlanPrompts."""
        ids = np.zeros(chunks.lens.sum(), dtype=np.int64)
        tokens = PassTokens(chunks.rows, chunks.ends - chunks.lens, chunks.lens, ids)
        self._cut(tokens, with_chunks=True)
        positions = to_device(tokens.positions, torch.int64, table.device)

        def run(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, window: Window) -> torch.Tensor:
            return self._attend(q, k_cache, v_cache, table, positions, AttentionLayer(0, window))

        return run

    def _unpack(self, packed: torch.Tensor, sizes: Sequence[Capacity], num_tokens: int) -> dict[Window, PieceLists]:
        """Views of what `_pack` has packed."""
        pieces: dict[Window, PieceLists] = {}
        parts = packed.split([_packed_size(size, num_tokens) for size in sizes])
        for window, size, part in zip(self.spec.windows, sizes, parts, strict=True):
            small, many, starts = part.split([_aligned(length) for length in _lengths(size, num_tokens)])
            pieces[window] = PieceLists(
                small[: size.small * PIECE_FIELDS].view(-1, PIECE_FIELDS),
                many[: size.large * PIECE_FIELDS].view(-1, PIECE_FIELDS),
                starts[: num_tokens + 1],
                size.partials,
            )
        return pieces


def _lengths(size: Capacity, num_tokens: int) -> tuple[int, int, int]:
    """Numbers in each of the lists of a window."""
    return size.small * PIECE_FIELDS, size.large * PIECE_FIELDS, num_tokens + 1


def _aligned(length: int) -> int:
    """Numbers that a list of so many takes. Kernels are compiled anew for a list that starts elsewhere."""
    return -(-length // ALIGNMENT) * ALIGNMENT


def _packed_size(size: Capacity, num_tokens: int) -> int:
    return sum(_aligned(length) for length in _lengths(size, num_tokens))


def _pack(splits: Sequence[KeySplits], sizes: Sequence[Capacity], num_tokens: int) -> np.ndarray:
    """int32: the pieces and places of each window, one behind the other, with room up to the sizes."""
    packed = np.zeros(sum(_packed_size(size, num_tokens) for size in sizes), dtype=np.int32)
    start = 0
    for one, size in zip(splits, sizes, strict=True):
        assert len(one.small) <= size.small and len(one.large) <= size.large and one.starts[-1] <= size.partials
        for values, length in zip((one.small, one.large, one.starts), _lengths(size, num_tokens), strict=True):
            packed[start : start + values.size] = values.reshape(-1)
            start += _aligned(length)
    return packed
