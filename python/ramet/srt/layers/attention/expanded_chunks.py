"""Owns which prompt chunks of a pass attend to expanded keys and values, and doing so a few heads at a time."""

import numpy as np
import torch

from ramet.srt.batch.pass_tokens import PassTokens
from ramet.srt.configs.latent_config import LatentTraits
from ramet.srt.layers.kernels.expanded_attention import TILE_FIELDS, HeadRange, expanded_attention, expanded_tile
from ramet.srt.layers.latent_linear import LatentHeads
from ramet.srt.utils.device import to_device

MIN_TOKENS = 256  # of a chunk: what attention saves then is more than what expanding the keys before it costs
EXPANDED_NBYTES = 256 << 20  # keys and values that there are at a time, unless one head's are more
MOST_KEYS = 1 << 19  # of all such chunks of a pass: each takes the memory of a row of the cache
STEP = 128  # a multiple of which are the rows of a library's product


class ExpandedChunks:
    """Those of one pass.

    Args:
        is_expanded: bool [num_sequences], of which some are true; see `find_expanded`.
        table: int64 [num_rows, max_pages].
    """

    def __init__(
        self, tokens: PassTokens, is_expanded: np.ndarray, table: torch.Tensor, page_size: int, latent: LatentTraits
    ):
        self._latent = latent
        starts, lens, ends = (part[is_expanded] for part in (tokens.starts, tokens.lens, tokens.ends))
        size = expanded_tile(table.device, latent).rows
        tiles = _tiles(tokens.first_tokens[:-1][is_expanded], starts, lens, size)
        self._tiles = to_device(tiles, torch.int32, table.device)
        rows = np.repeat(tokens.rows[is_expanded], ends)
        positions = np.arange(len(rows)) - np.repeat(np.cumsum(ends) - ends, ends)
        rows_and_positions = to_device(np.stack([rows, positions]), torch.int64, table.device)
        pages = table[rows_and_positions[0], rows_and_positions[1] // page_size]
        slots = pages * page_size + rows_and_positions[1] % page_size
        self._slots = torch.nn.functional.pad(
            slots, (0, -len(slots) % STEP)
        )  # int64: num_keys, and nobody's behind them
        others = ~np.repeat(is_expanded, tokens.lens)
        self.others: PassTokens | None = None  # the other sequences, whose queries attend to rows
        self.other_places: torch.Tensor  # int64: where their tokens are in the pass
        if others.any():
            rest = ~is_expanded
            self.others = PassTokens(tokens.rows[rest], tokens.starts[rest], tokens.lens[rest], tokens.ids[others])
            self.other_places = to_device(np.flatnonzero(others), torch.int64, table.device)

    def run(self, q: torch.Tensor, cache: torch.Tensor, heads: LatentHeads, scale: float, out: torch.Tensor) -> None:
        """Write the chunks' tokens of out, [num_tokens, num_heads, value_dim].

        Args:
            q: [num_tokens, num_heads, query_dim], rotated.
            cache: [num_slots, 1, row_dim], with the rows of the pass.
        """
        rows = cache.squeeze(1).index_select(0, self._slots)
        weight = heads.matrix()
        size = self._latent.nope_dim + self._latent.value_dim
        number = max(1, min(heads.num_heads, EXPANDED_NBYTES // (len(rows) * size * rows.itemsize)))
        for first in range(0, heads.num_heads, number):
            part = weight[first * size : (first + number) * size]
            kv = torch.nn.functional.linear(rows[:, : self._latent.kv_rank], part).unflatten(1, (-1, size))
            head_range = HeadRange(first, kv.shape[1])
            expanded_attention(q, kv, rows, self._tiles, out, head_range, self._latent, scale)


def find_expanded(tokens: PassTokens) -> np.ndarray:
    """bool [num_sequences]: which have so many new tokens that expanding pays, as far as there is memory for it."""
    is_long = tokens.lens >= MIN_TOKENS
    return is_long & (np.cumsum(np.where(is_long, tokens.ends, 0)) <= MOST_KEYS)


def _tiles(first: np.ndarray, starts: np.ndarray, lens: np.ndarray, size: int) -> np.ndarray:
    """int32 [num_tiles, TILE_FIELDS] of at most `size` tokens each, those with the most keys first."""
    counts = -(-lens // size)
    before = (np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)) * size
    tiles = np.empty((len(before), TILE_FIELDS), dtype=np.int32)
    ends = starts + lens
    tiles[:, 0] = np.repeat(first, counts) + before
    tiles[:, 1] = np.minimum(size, np.repeat(lens, counts) - before)
    tiles[:, 2] = np.repeat(np.cumsum(ends) - ends, counts)
    tiles[:, 4] = np.repeat(starts, counts) + before
    tiles[:, 3] = tiles[:, 4] + tiles[:, 1]
    return tiles[(-tiles[:, 3]).argsort(kind="stable")]
