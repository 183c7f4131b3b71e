"""The tokens of a pass on the host, against what a loop over the sequences says."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from ramet.srt.batch.batch_plan import LAST_TOKEN, SequencePlan, SharedPrefix
from ramet.srt.batch.pass_tokens import PassTokens, TokenGroups

SEQUENCES = st.lists(st.tuples(st.integers(0, 50), st.integers(1, 6)), max_size=8)  # start, new tokens
PADDING_ROW = 99


def make(sequences, shared=()):
    plans = []
    for row, (start, new) in enumerate(sequences):
        ids = [LAST_TOKEN] if new == 1 else list(range(new))
        plans.append(SequencePlan(rid=str(row), row=row, start=start, input_ids=ids, is_sampled=True))
    return PassTokens.of(plans, shared)


def listed(tokens):
    """(row, position, id) of each token, as the arrays by token say."""
    return list(zip(*(part.tolist() for part in (tokens.row_of_token, tokens.positions, tokens.ids)), strict=True))


def expected(sequences):
    found = []
    for row, (start, new) in enumerate(sequences):
        found += [(row, start + place, LAST_TOKEN if new == 1 else place) for place in range(new)]
    return found


def runs(numbers):
    """Shared prefixes of sequences side by side: of so many each."""
    first, shared = 0, []
    for number in numbers:
        if number > 1:
            shared.append(SharedPrefix(first, number, 16))
        first += number
    return shared


@settings(max_examples=100, deadline=None)
@given(SEQUENCES)
def test_tokens_stand_sequence_by_sequence(sequences):
    tokens = make(sequences)
    assert listed(tokens) == expected(sequences)
    assert tokens.num_tokens == len(expected(sequences)) and tokens.is_decode == all(new == 1 for _, new in sequences)
    assert tokens.ends.tolist() == [start + new for start, new in sequences]
    for index in range(len(sequences)):
        first, end = tokens.first_tokens[index : index + 2]
        assert {row for row, *_ in listed(tokens)[first:end]} == {index}


@settings(max_examples=100, deadline=None)
@given(SEQUENCES, st.integers(0, 9), st.lists(st.integers(1, 4), max_size=3))
def test_padding_stands_behind_and_belongs_to_nobody(sequences, missing, numbers):
    tokens = make(sequences, runs(numbers))
    padded = tokens.padded(tokens.num_tokens + missing, PADDING_ROW)
    assert listed(padded) == [*expected(sequences), *[(PADDING_ROW, 0, 0)] * missing]
    assert padded.shared == tokens.shared and padded.is_decode == tokens.is_decode
    assert padded.ends[len(sequences) :].tolist() == [1] * missing


@settings(max_examples=100, deadline=None)
@given(SEQUENCES, st.integers(0, 8), st.integers(0, 8), st.lists(st.integers(1, 4), max_size=4))
def test_a_part_is_a_pass_of_its_own(sequences, first, number, numbers):
    """Of the shared prefixes it has those all of whose sequences it has."""
    first = min(first, len(sequences))
    end = min(first + number, len(sequences))
    part = make(sequences, runs(numbers)).part(slice(first, end))
    alone = make(sequences[first:end])
    assert part.rows.tolist() == list(range(first, end))
    assert [(row - first, *rest) for row, *rest in listed(part)] == listed(alone)
    for name in ("starts", "lens", "ends", "first_tokens"):
        assert np.array_equal(getattr(part, name), getattr(alone, name))
    whole = [one for one in runs(numbers) if first <= one.first and one.first + one.num_sequences <= end]
    assert part.shared == [SharedPrefix(one.first - first, one.num_sequences, one.num_tokens) for one in whole]


def test_a_pass_may_have_no_tokens():
    tokens = make([])
    assert tokens.num_tokens == 0 and tokens.is_decode and tokens.first_tokens.tolist() == [0]
    assert tokens.padded(2, PADDING_ROW).rows.tolist() == [PADDING_ROW] * 2
    assert PassTokens.padding(PADDING_ROW, [3, 1]).positions.tolist() == [0, 1, 2, 0]
    assert PassTokens.padding(PADDING_ROW, [2, 1], 7).positions.tolist() == [7, 8, 7]


@settings(max_examples=100, deadline=None)
@given(st.lists(SEQUENCES, min_size=1, max_size=3), st.integers(0, 5), st.data())
def test_groups_stand_behind_each_other_each_padded_to_its_size(groups, missing, data):
    tokens = make([sequence for group in groups for sequence in group])
    ends = np.cumsum([0, *map(len, groups)]).tolist()
    parts = [slice(*pair) for pair in itertools.pairwise(ends)]
    own = data.draw(st.integers(0, len(groups) - 1))
    made = TokenGroups(tokens, parts, own)
    assert sum(made.counts) == tokens.num_tokens
    sizes = [count + missing for count in made.counts]
    grouped = made.padded(sizes, PADDING_ROW)
    assert grouped.rows[grouped.places].tolist() == tokens.row_of_token.tolist()
    assert grouped.ids[grouped.places].tolist() == tokens.ids.tolist()
    padding = np.ones(sum(sizes), dtype=bool)
    padding[grouped.places] = False
    assert set(grouped.rows[padding]) <= {PADDING_ROW} and padding.sum() == missing * len(groups)
    assert len(grouped.rows) == len(grouped.ids) == sum(sizes) and grouped.own.num_tokens == sizes[own]
    start = sum(sizes[:own])
    assert grouped.own.row_of_token.tolist() == grouped.rows[start : start + sizes[own]].tolist()


def test_adapters_of_groups_are_padded_with_none():
    tokens = make([(0, 2), (3, 1), (0, 1)])
    tokens.lora_slots = np.array([4, -1, 2], dtype=np.int32)
    grouped = TokenGroups(tokens, [slice(0, 1), slice(1, 3)], 1).padded([3, 2], PADDING_ROW)
    assert grouped.lora_slots.tolist() == [4, 4, -1, -1, 2]
    assert grouped.own.lora_slot_of_token.tolist() == [-1, 2]
