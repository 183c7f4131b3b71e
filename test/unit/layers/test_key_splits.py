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


def random_pass(generator, splitter):
    """Sequences at and around the borders of tiles, pieces and windows, some with common prefixes."""
    number, edge = generator.choice([1, 2, 3, generator.randint(1, 60)]), splitter.small.tokens
    is_decode = generator.random() < 0.5
    lens = [
        1 if is_decode else generator.choice([1, 1, edge, edge + 1, generator.randint(1, 200)]) for _ in range(number)
    ]
    starts = [generator.choice([0, 1, 127, 128, 129, generator.randint(0, 3000)]) for _ in range(number)]
    if generator.random() < 0.2:
        starts[-1] = generator.randint(3000, 60000)
    shared, first = [], 0
    while first + 2 <= number and generator.random() < 0.8:
        size = generator.randint(2, min(number - first, 20))
        prefix = SharedPrefix(first, size, generator.choice([16, 128, 256, 4096]))
        if set(lens[first : first + size]) == {1}:
            shared.append(prefix)
            starts[first : first + size] = [start + prefix.num_tokens for start in starts[first : first + size]]
        first += size
    return make_tokens(starts, lens, shared)


@pytest.mark.parametrize("window", [None, 1, 100, 128, 1000])
@pytest.mark.parametrize("group", [1, 3, 4, 7, 20])
def test_every_token_sees_its_keys_once(group, window):
    generator = random.Random(f"{group} {window}")
    splitter = make_splitter(group, generator.choice([1, 8, 128]), window)
    for _ in range(8):
        tokens = random_pass(generator, splitter)
        check(tokens.padded(tokens.num_tokens + generator.choice([0, 1, 60]), row=99), splitter)


@pytest.mark.parametrize("number", [31, 255, 511])
def test_one_long_sequence_is_split_and_the_short_ones_are_not(number):
    splits = check(make_tokens([511] * number + [31999], [1] * (number + 1)), make_splitter())
    longest = max(stop - start for _, _, _, start, stop, _ in splits.small.tolist())
    assert longest < 2000
    short = [piece for piece in splits.small.tolist() if piece[1] < number]
    assert len(short) == number


def test_a_long_sequence_is_split_that_comes_in_place_of_a_short_one():
    """Among so many others it changes their number not at all and their keys little."""
    splitter = make_splitter()
    lengths = [1000 + index % 7 for index in range(128)]
    assert len(check(make_tokens(lengths, [1] * 128), splitter).small) == 128
    splits = check(make_tokens([*lengths[1:], 13000], [1] * 128), splitter)
    assert max(stop - start for _, _, _, start, stop, _ in splits.small.tolist()) < 6500


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


@pytest.mark.parametrize("number", [2, 3, 5])
def test_few_sequences_share_a_prefix_too(number):
    starts = [3000 + own for own in range(number)]
    shared = check(make_tokens(starts, [1] * number, [SharedPrefix(0, number, 3000)]), make_splitter())
    assert set(shared.small[shared.small[:, 4] <= 3000][:, 2].tolist()) <= {min(number, 4), number - 4}


def test_a_short_shared_prefix_is_read_by_each():
    tokens = make_tokens([40, 50, 60], [1, 1, 1], [SharedPrefix(0, 3, 32)])
    assert (check(tokens, make_splitter()).small[:, 2] == 1).all()


def test_prompt_chunks_take_large_tiles_and_few_new_tokens_small_ones():
    splits = check(make_tokens([500, 300, 0], [1, 4, 100]), make_splitter())
    assert set(splits.small[:, 0].tolist()) == {0, 1} and set(splits.large[:, 0].tolist()) == {2}
