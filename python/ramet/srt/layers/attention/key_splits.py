"""Owns how the attention of a pass is cut into pieces of about as many keys each, whatever the lengths. No torch.

A piece is a tile of query rows against a range of keys. The keys of a long sequence are spread over several pieces,
whose results are combined (FlashDecoding; Dao et al., 2023). The query heads that share a KV head, the tokens of one
sequence, and sequences with a common prefix share a tile, so that their keys are read once (cascade inference; Ye et
al., 2024).
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ramet.srt.batch.batch_plan import SharedPrefix
from ramet.srt.batch.pass_tokens import PassTokens

PIECE_FIELDS = 6
ROW, FIRST, TOKENS, START, STOP, PLACE = range(PIECE_FIELDS)  # see KeySplits
KEY_STEP = 128  # pieces of one range of keys are of a multiple of it
MIN_CHUNK_KEYS = 1024  # of a piece, for tiles of prompt chunks
MIN_SHARED_KEYS = 128  # a shorter prefix is read again by every sequence
SLOTS = 3  # programs with a small tile that a multiprocessor runs at a time
LARGE_SLOTS = 2  # the same with a large tile
MAX_ROUNDS = 4  # of all slots, to which the keys of a pass are spread
# What was measured on an H200 with heads of 128, in keys that one slot reads in the time:
PIECE_COST = 128  # to begin a piece
SPLIT_COST = 64  # to combine anything
BASE_SHARE, SLOT_SHARE = 0.36, 0.8  # with a share s of the slots a round takes BASE_SHARE + SLOT_SHARE * s, at most 1
LIKE_LENGTHS = 1.1  # numbers of keys whose ratio is at most this are split alike


class Tile(NamedTuple):
    """Query rows of a piece: all heads of a group, for some tokens."""

    rows: int
    group: int  # query heads that share a KV head

    @property
    def tokens(self) -> int:
        return self.rows // self.group


class Capacity(NamedTuple):
    """The most that passes of a number of tokens need."""

    small: int  # pieces
    large: int  # pieces
    partials: int  # partial results, each for all heads of a token


@dataclass(frozen=True)
class KeySplits:
    """What the kernels read of one pass, for the layers with one window.

    `small` and `large` are int32 [num_pieces, PIECE_FIELDS], the longest first: row of the page table, first token of
    the pass, number of tokens, first key, end of the keys, place among the pieces of these tokens. `starts` is int32
    [num_tokens + 1]: where the partial results of each token start. A token in one piece alone has none: its result is
    written at once.
    """

    small: np.ndarray
    large: np.ndarray
    starts: np.ndarray


# Tiles with all the keys that they see, as pieces that are not yet cut: int32 [num_units, PIECE_FIELDS].
Units = np.ndarray
NO_PIECES = np.zeros((0, PIECE_FIELDS), dtype=np.int32)


class KeySplitter:
    """Cuts passes for one kind of layer on one device.

    Args:
        small, large: tiles of sequences with few new tokens, and with more.
        num_multiprocessors: of the device, which the pieces are to keep busy.
        window: see AttentionLayer.
        programs: that a multiprocessor runs at a time, with a small and with a large tile.
    """

    def __init__(
        self,
        small: Tile,
        large: Tile,
        num_kv_heads: int,
        num_multiprocessors: int,
        window: int | None,
        programs: tuple[int, int] = (SLOTS, LARGE_SLOTS),
    ):
        self.small, self.large = small, large
        self.window = window
        self._slots = max(1, programs[0] * num_multiprocessors // num_kv_heads)  # for each KV head
        self._tried, self._best_wanted = (0, 0, 0), 0  # see _best_sizes
        self._wanted_large = max(1, programs[1] * num_multiprocessors // num_kv_heads)

    def capacity(self, num_tokens: int, has_chunks: bool) -> Capacity:
        """What any pass of so many tokens needs at most; with no chunks, no sequence needs a large tile."""
        wanted = MAX_ROUNDS * self._slots
        small = wanted + num_tokens + _room_for_shared(num_tokens)
        partials = 2 * num_tokens + wanted * self.small.tokens
        if not has_chunks:
            return Capacity(small, 0, partials)
        num_chunks = num_tokens // (self.small.tokens + 1)
        large = self._wanted_large + num_tokens // self.large.tokens + num_chunks
        return Capacity(small, large, partials + num_tokens + self._wanted_large * self.large.tokens)

    def is_chunk(self, tokens: PassTokens) -> np.ndarray:
        """bool [num_sequences]: which have more new tokens than a small tile holds."""
        return tokens.lens > self.small.tokens

    def split(self, tokens: PassTokens, with_chunks: bool = True) -> KeySplits:
        """The pieces of a pass; without those of the sequences that need large tiles, where others compute these."""
        own = self._units(tokens)
        shared = self._share(tokens, own)
        few, large, large_counts = own, NO_PIECES, None
        if not tokens.is_decode and (is_chunk := self.is_chunk(tokens)).any():
            few = own[~is_chunk]
            if with_chunks:
                tiles = self._tiles(own[is_chunk], tokens.starts[is_chunk])
                sizes, large_counts = _split_sizes(tiles[:, STOP] - tiles[:, START], self._wanted_large, MIN_CHUNK_KEYS)
                large = _pieces(tiles, sizes, large_counts)
        small = np.concatenate([shared, few]) if len(shared) else few
        sizes, counts = self._best_sizes(small[:, STOP] - small[:, START])
        num_pieces = _sum_over_tokens(small, counts, tokens.num_tokens)
        if len(shared):
            before = _sum_over_tokens(shared, counts[: len(shared)], tokens.num_tokens)
            small[len(shared) :, PLACE] = before[few[:, FIRST]]
        if large_counts is not None:
            num_pieces = num_pieces + _sum_over_tokens(tiles, large_counts, tokens.num_tokens)
        starts = np.zeros(tokens.num_tokens + 1, dtype=np.int32)
        (num_pieces * (num_pieces > 1)).cumsum(out=starts[1:])
        return KeySplits(_pieces(small, sizes, counts), large, starts)

    def _units(self, tokens: PassTokens) -> Units:
        """Each sequence as one."""
        units = np.zeros((len(tokens.rows), PIECE_FIELDS), dtype=np.int32)
        units[:, ROW], units[:, FIRST], units[:, TOKENS] = tokens.rows, tokens.first_tokens[:-1], tokens.lens
        units[:, STOP] = tokens.ends
        if self.window is not None:
            units[:, START] = self._first_visible(tokens.starts)
        return units

    def _first_visible(self, positions: np.ndarray) -> np.ndarray:
        """The first key that tokens at these positions see."""
        assert self.window is not None
        return np.maximum(0, positions + 1 - self.window)

    def _best_sizes(self, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Keys in a piece of each unit, and its pieces: as many as let the slots end about together, and no more.

        How many those are is tried out when the units are others, in their number, keys or longest.
        """
        if len(lengths) == 0:
            return _split_sizes(lengths, 0, KEY_STEP)
        tried = len(lengths), int(lengths.sum()), int(lengths.max())
        if not _is_alike(tried, self._tried):
            wanted = [rounds * self._slots for rounds in range(MAX_ROUNDS + 1)]
            costs = [self._estimate(*_split_sizes(lengths, pieces, KEY_STEP)) for pieces in wanted]
            self._best_wanted = wanted[int(np.argmin(costs))]
            self._tried = tried
        return _split_sizes(lengths, self._best_wanted, KEY_STEP)

    def _estimate(self, sizes: np.ndarray, counts: np.ndarray) -> float:
        """How long the slots take, in keys that one reads: round by round, the longest pieces first."""
        longest_first = np.sort(np.repeat(sizes, counts))[::-1]
        full, rest = divmod(len(longest_first), self._slots)
        total = float((longest_first[:: self._slots][:full] + PIECE_COST).sum())
        if rest:
            share = min(1.0, BASE_SHARE + SLOT_SHARE * rest / self._slots)
            total += share * float(longest_first[full * self._slots] + PIECE_COST)
        return total + SPLIT_COST * bool((counts > 1).any())

    def _share(self, tokens: PassTokens, own: Units) -> Units:
        """Tiles of sequences with a common prefix, against that; the sequences' own keys start behind it from then."""
        found: list[Units] = []
        room, width = _room_for_shared(tokens.num_tokens), self.small.tokens
        for prefix in tokens.shared if width > 1 else []:
            members = slice(prefix.first, prefix.first + prefix.num_sequences)
            number = -(-prefix.num_sequences // width)
            if number > room or not _pays(prefix, own[members]):
                continue
            units = own[members][::width].copy()
            units[:, TOKENS] = width
            units[-1, TOKENS] = prefix.num_sequences - (number - 1) * width
            units[:, STOP] = own[members, START] = prefix.num_tokens
            found.append(units)
            room -= number
        return np.concatenate(found) if found else NO_PIECES

    def _tiles(self, chunks: Units, positions: np.ndarray) -> Units:
        """Each chunk as tiles of the large kind. `positions`: of the first token of each."""
        width = self.large.tokens
        counts = -(-chunks[:, TOKENS] // width)
        before = _places(counts) * width  # tokens of the chunk before the tile
        positions = np.repeat(positions, counts) + before
        tiles = np.repeat(chunks, counts, axis=0)
        tiles[:, FIRST] += before
        tiles[:, TOKENS] = np.minimum(width, tiles[:, TOKENS] - before)
        if self.window is not None:
            tiles[:, START] = self._first_visible(positions)
        tiles[:, STOP] = positions + tiles[:, TOKENS]
        return tiles


def _is_alike(units: tuple[int, int, int], tried: tuple[int, int, int]) -> bool:
    """Whether units of such a number, with such keys and longest, are to be split as those that were tried."""
    if units[0] != tried[0]:
        return False
    keys, longest = units[1] / tried[1], units[2] / tried[2]
    return 1 / LIKE_LENGTHS < keys < LIKE_LENGTHS and 1 / LIKE_LENGTHS < longest < LIKE_LENGTHS


def _pays(prefix: SharedPrefix, members: Units) -> bool:
    """Whether to read the prefix once for these sequences, all of which see all of it, with one token each."""
    is_whole = not members[:, START].any() and bool((members[:, TOKENS] == 1).all())
    return is_whole and prefix.num_tokens >= MIN_SHARED_KEYS


def _room_for_shared(num_tokens: int) -> int:
    """Tiles against common prefixes that a pass has at most: those of tiles that hold four sequences, at least one."""
    return -(-num_tokens // 4)


def _places(counts: np.ndarray) -> np.ndarray:
    """0, 1, … up to each count, one behind the other."""
    ends = counts.cumsum()
    return np.arange(ends[-1]) - (ends - counts).repeat(counts)


def _split_sizes(lengths: np.ndarray, wanted: int, least: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys in a piece of each unit, and its pieces: about `wanted` in all, of one size in a unit; 0: no splits."""
    if wanted == 0:
        return lengths, np.ones_like(lengths)
    size = max(least, -(-int(lengths.sum()) // (wanted * KEY_STEP)) * KEY_STEP)
    counts = -(-lengths // size)
    sizes = -(-lengths // (counts * KEY_STEP)) * KEY_STEP
    return sizes, -(-lengths // sizes)


def _sum_over_tokens(units: Units, counts: np.ndarray, num_tokens: int) -> np.ndarray:
    """[num_tokens]: the counts of the units that each token is in."""
    if len(counts) == num_tokens and (units[:, TOKENS] == 1).all():
        return counts  # every token has a unit of its own
    firsts = units[:, FIRST]
    changes = np.bincount(firsts, weights=counts, minlength=num_tokens + 1)
    changes -= np.bincount(firsts + units[:, TOKENS], weights=counts, minlength=num_tokens + 1)
    return np.cumsum(changes[:num_tokens]).astype(np.int64)


def _pieces(units: Units, sizes: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """int32 [num_pieces, PIECE_FIELDS]; `units` have the place of their first piece."""
    pieces = units
    if int(counts.sum()) > len(counts):
        number, size = _places(counts), sizes.repeat(counts)
        pieces = units.repeat(counts, axis=0)
        pieces[:, PLACE] += number
        pieces[:, START] += number * size
        pieces[:, STOP] = np.minimum(pieces[:, START] + size, pieces[:, STOP])
    return pieces[(pieces[:, START] - pieces[:, STOP]).argsort(kind="stable")]
