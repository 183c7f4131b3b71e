"""Owns the tests of how a pass's attention is cut into pieces."""

import random

import numpy as np
import pytest
from ramet.srt.batch.batch_plan import SharedPrefix
from ramet.srt.batch.pass_tokens import PassTokens
from ramet.srt.layers.attention.key_splits import KeySplitter, Tile

MULTIPROCESSORS = 132


def make_tokens(starts, lens, shared=()):
    starts, lens = np.array(starts), np.array(lens)
    return PassTokens(np.arange(len(starts)), starts, lens, np.zeros(lens.sum(), dtype=np.int64), list(shared))


def make_splitter(group=4, num_kv_heads=8, window=None):
    return KeySplitter(Tile(max(16, group), group), Tile(max(64, group), group), num_kv_heads, MULTIPROCESSORS, window)


def check(tokens, splitter):
    """Every token must see each of its keys once, and find its results where the pieces put them."""
    splits = splitter.split(tokens)
    capacity = splitter.capacity(tokens.num_tokens, has_chunks=not tokens.is_decode)
    assert len(splits.small) <= capacity.small and len(splits.large) <= capacity.large
    assert splits.starts[-1] <= capacity.partials
    pieces = [[] for _ in range(tokens.num_tokens)]
    for _, first, number, start, stop, place in (*splits.small.tolist(), *splits.large.tolist()):
        assert start < stop
        for token in range(first, first + number):
            pieces[token].append((start, stop, place))
    for token, own in enumerate(pieces):
        position = int(tokens.positions[token])
        first = 0 if splitter.window is None else max(0, position + 1 - splitter.window)
        reads = np.zeros(tokens.ends.max(), dtype=int)
        for start, stop, _ in own:
            reads[start:stop] += 1
        assert (reads[first : position + 1] == 1).all()
        assert sorted(place for *_, place in own) == list(range(len(own)))
        assert splits.starts[token + 1] - splits.starts[token] == (len(own) if len(own) > 1 else 0)
    return splits


@pytest.mark.parametrize("seed", range(20))
def test_every_token_sees_its_keys_once(seed):
    generator = random.Random(seed)
    for decode in (True, False):
        number = generator.randint(1, 30)
        lens = [1 if decode else generator.choice([1, 1, 3, generator.randint(1, 200)]) for _ in range(number)]
        starts = [generator.choice([0, 5, generator.randint(0, 3000)]) for _ in range(number)]
        shared = []
        if decode and number > 2:
            first = generator.randint(0, number - 2)
            prefix = SharedPrefix(first, generator.randint(2, number - first), generator.choice([16, 256, 1024]))
            for member in range(first, first + prefix.num_sequences):
                starts[member] += prefix.num_tokens
            shared.append(prefix)
        group, window = generator.choice([1, 4, 7, 20]), generator.choice([None, 100, 1000])
        check(make_tokens(starts, lens, shared), make_splitter(group, generator.choice([1, 8]), window))


def test_one_long_sequence_is_split_and_the_short_ones_are_not():
    splits = check(make_tokens([511] * 31 + [31999], [1] * 32), make_splitter())
    longest = max(stop - start for _, _, _, start, stop, _ in splits.small.tolist())
    assert longest < 2000
    short = [piece for piece in splits.small.tolist() if piece[1] < 31]
    assert len(short) == 31


def test_the_longest_pieces_come_first():
    splits = make_splitter().split(make_tokens([30, 9000, 700, 5], [1] * 4))
    lengths = (splits.small[:, 4] - splits.small[:, 3]).tolist()
    assert lengths == sorted(lengths, reverse=True)


def test_a_shared_prefix_is_read_once_by_as_many_sequences_as_a_tile_holds():
    starts = [2000 + own for own in range(16)]
    alone = make_splitter().split(make_tokens(starts, [1] * 16)).small
    shared = check(make_tokens(starts, [1] * 16, [SharedPrefix(0, 16, 2000)]), make_splitter()).small

    def keys(pieces):
        return int((pieces[:, 4] - pieces[:, 3]).sum())

    assert keys(shared) <= keys(alone) / 3.5  # tiles of 16 rows: four sequences of 4 heads each


def test_a_short_shared_prefix_is_read_by_each():
    tokens = make_tokens([40, 50, 60], [1, 1, 1], [SharedPrefix(0, 3, 32)])
    assert (check(tokens, make_splitter()).small[:, 2] == 1).all()


def test_prompt_chunks_take_large_tiles_and_few_new_tokens_small_ones():
    splits = check(make_tokens([500, 300, 0], [1, 4, 100]), make_splitter())
    assert set(splits.small[:, 0].tolist()) == {0, 1} and set(splits.large[:, 0].tolist()) == {2}
