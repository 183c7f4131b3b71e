"""Owns attention over latent rows with Ramet's Triton kernels, but for long prompt chunks, which are expanded."""

import numpy as np
import torch

from ramet.srt.batch.forward_batch_info import ForwardBatch
from ramet.srt.batch.pass_tokens import PassTokens
from ramet.srt.layers.attention.base_attn_backend import AttentionLayer, CapturedShape, PassLimits
from ramet.srt.layers.attention.expanded_chunks import ExpandedChunks, find_expanded
from ramet.srt.layers.attention.triton_backend import Tiling, TritonAttnBackend
from ramet.srt.layers.kernels.latent_attention import PROGRAMS, head_group, latent_attention, latent_tile
from ramet.srt.layers.kernels.runtime import is_interpreted

# Pairs of query and key in long chunks from which on expanding them saves more than a graph, which holds rows alone.
LAUNCHED_PAIRS = 1 << 20


class LatentTritonAttnBackend(TritonAttnBackend):
    """Cuts passes as its base does, with heads in groups of equal sizes that share the rows of a tile."""

    prefers_alike = True

    _positions: torch.Tensor  # of the queries of a launched pass that `forward` gets

    def _choose_tiles(self) -> Tiling:
        spec = self.spec
        group = head_group(spec.num_heads, spec.dtype)
        small, large = (latent_tile(spec.device, spec.dtype, group, is_large=is_large) for is_large in (False, True))
        return Tiling(small, large, group, -(-spec.num_heads // group), (PROGRAMS, PROGRAMS))

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        if forward_batch.is_captured:
            return  # cut already: that is done on the host
        tokens = self._expand(forward_batch)
        if tokens is not None:
            self._cut(tokens, with_chunks=True)

    def _expand(self, forward_batch: ForwardBatch) -> PassTokens | None:
        """Find the chunks of a launched pass that are expanded. Returns what attends to rows, whose positions it sets.

        None if all chunks are expanded.
        """
        tokens, latent = forward_batch.tokens, self.spec.latent
        self.expanded, self._positions = None, forward_batch.positions
        if latent is None or (self.spec.dtype == torch.float32 and not is_interpreted()):
            return tokens
        is_expanded = self._find_expanded(tokens)
        if not is_expanded.any():
            return tokens
        self.expanded = ExpandedChunks(tokens, is_expanded, forward_batch.req_to_page, self.spec.page_size, latent)
        if self.expanded.others is not None:
            self._positions = self._positions[self.expanded.other_places]
        return self.expanded.others

    def _find_expanded(self, tokens: PassTokens) -> np.ndarray:
        """bool [num_sequences]: whose chunks are to be expanded where they are launched."""
        return find_expanded(tokens)

    def init_forward_metadata_replay_cuda_graph(
        self, shape: CapturedShape, tokens: PassTokens, rows: torch.Tensor
    ) -> None:
        self.expanded = None
        super().init_forward_metadata_replay_cuda_graph(shape, tokens, rows)

    def forward(self, q: torch.Tensor, layer: AttentionLayer, forward_batch: ForwardBatch) -> torch.Tensor:
        rows, _ = self.kv_pool.get_kv_buffer(layer.layer_id)
        return latent_attention(
            q,
            rows,
            self.spec.kv.value_dim,
            forward_batch.req_to_page,
            forward_batch.positions if forward_batch.is_captured else self._positions,
            self._current[layer.sliding_window],
            self._tiling.small,
            self._tiling.large,
            group=self._tiling.group,
            page_size=self.spec.page_size,
            scale=self.spec.scale,
        )

    def prefers_launches(self, tokens: PassTokens) -> bool:
        is_expanded = self._find_expanded(tokens)
        return int((tokens.lens * (tokens.starts + tokens.ends))[is_expanded].sum()) // 2 >= LAUNCHED_PAIRS

    def use_quiet_moment(self, _limits: PassLimits) -> None:
        """There are no other kernels to try."""
