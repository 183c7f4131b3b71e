"""Owns the new tokens of one pass on the host: sequence by sequence, as arrays. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from ramet.srt.batch.batch_plan import SequencePlan, SharedPrefix


@dataclass
class PassTokens:
    """The new tokens of some sequences, which stand one behind the other."""

    rows: np.ndarray  # int64 [num_sequences], of the page table
    starts: np.ndarray  # int64 [num_sequences]: tokens in the KV cache before the pass
    lens: np.ndarray  # int64 [num_sequences]: new tokens
    ids: np.ndarray  # int64 [num_tokens]; LAST_TOKEN for the one that the row's last pass chose
    shared: list[SharedPrefix] = field(default_factory=list)
    lora_slots: np.ndarray | None = None  # int32 [num_sequences], of adapters; None: no sequence has one
    saves: list[list[tuple[int, int]]] | None = None  # by sequence, see SequencePlan; None: there are none

    @classmethod
    def of(cls, sequences: Sequence[SequencePlan], shared: Sequence[SharedPrefix] = ()) -> "PassTokens":
        """Those of some sequences of a plan."""
        ids = [sequence.input_ids for sequence in sequences]
        return cls(
            np.array([sequence.row for sequence in sequences], dtype=np.int64),
            np.array([sequence.start for sequence in sequences], dtype=np.int64),
            np.array([len(part) for part in ids], dtype=np.int64),
            np.concatenate([np.zeros(0, dtype=np.int64), *(np.asarray(part, dtype=np.int64) for part in ids)]),
            list(shared),
            _lora_slots(sequences),
            [sequence.saves for sequence in sequences] if any(sequence.saves for sequence in sequences) else None,
        )

    @classmethod
    def padding(cls, row: int, lens: Sequence[int], start: int = 0) -> "PassTokens":
        """Tokens that belong to nobody, in sequences of so many, each behind `start` others of the table's `row`."""
        new = np.array(lens, dtype=np.int64)
        zeros = np.zeros(len(new), dtype=np.int64)
        return cls(zeros + row, zeros + start, new, np.zeros(new.sum(), dtype=np.int64))

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    @property
    def is_decode(self) -> bool:
        """Whether each sequence has one new token."""
        return len(self.rows) == len(self.ids)

    @cached_property
    def ends(self) -> np.ndarray:
        """int64 [num_sequences]: tokens in the KV cache after the pass."""
        return self.starts + self.lens

    @cached_property
    def first_tokens(self) -> np.ndarray:
        """int64 [num_sequences + 1]: where each sequence's new tokens begin, and the end of the last."""
        if self.is_decode:
            return np.arange(len(self.lens) + 1)
        return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(self.lens)])

    @cached_property
    def row_of_token(self) -> np.ndarray:
        """int64 [num_tokens]."""
        return self.rows if self.is_decode else np.repeat(self.rows, self.lens)

    @cached_property
    def lora_slot_of_token(self) -> np.ndarray | None:
        """int32 [num_tokens]; None if no token has an adapter."""
        if self.lora_slots is None or self.is_decode:
            return self.lora_slots
        return np.repeat(self.lora_slots, self.lens)

    @cached_property
    def positions(self) -> np.ndarray:
        """int64 [num_tokens]: the place of each token in its sequence."""
        if self.is_decode:
            return self.starts
        return np.arange(self.num_tokens) + np.repeat(self.starts - self.first_tokens[:-1], self.lens)

    def part(self, sequences: slice) -> "PassTokens":
        """Some of the sequences, by themselves."""
        first, end = self.first_tokens[sequences.start], self.first_tokens[sequences.stop]
        shared = [
            SharedPrefix(prefix.first - sequences.start, prefix.num_sequences, prefix.num_tokens)
            for prefix in self.shared
            if sequences.start <= prefix.first and prefix.first + prefix.num_sequences <= sequences.stop
        ]
        return PassTokens(
            self.rows[sequences],
            self.starts[sequences],
            self.lens[sequences],
            self.ids[first:end],
            shared,
            None if self.lora_slots is None else self.lora_slots[sequences],
            None if self.saves is None else self.saves[sequences],
        )

    def saves_of(self, sequence: int) -> list[tuple[int, int]]:
        """See SequencePlan."""
        return [] if self.saves is None else self.saves[sequence]

    def padded(self, num_tokens: int, row: int) -> "PassTokens":
        """So many tokens: behind these, single ones that belong to nobody, at the start of the table's `row`."""
        missing = num_tokens - self.num_tokens
        if missing == 0:
            return self
        zeros = np.zeros(missing, dtype=np.int64)
        return PassTokens(
            np.concatenate([self.rows, zeros + row]),
            np.concatenate([self.starts, zeros]),
            np.concatenate([self.lens, zeros + 1]),
            np.concatenate([self.ids, zeros]),
            self.shared,
            None if self.lora_slots is None else np.concatenate([self.lora_slots, np.full(missing, -1, np.int32)]),
            None if self.saves is None else [*self.saves, *([] for _ in range(missing))],
        )


@dataclass(frozen=True)
class GroupedTokens:
    """The tokens of a pass as data-parallel attention has them: group by group, each padded to a size."""

    own: PassTokens  # of one group
    own_group: int
    sizes: list[int]  # of all groups
    rows: np.ndarray  # int64 [sum of sizes], and the ids: of all groups
    ids: np.ndarray
    lora_slots: np.ndarray | None  # int32 [sum of sizes]
    places: np.ndarray  # int64 [num_tokens]: where the tokens of the pass stand among those


@dataclass(frozen=True)
class TokenGroups:
    """The tokens of a pass, and which attention group computes which of them."""

    tokens: PassTokens
    parts: Sequence[slice]  # the sequences of each group, one behind the other
    own: int

    @cached_property
    def counts(self) -> list[int]:
        """Tokens of each group."""
        first = self.tokens.first_tokens
        return [int(first[part.stop] - first[part.start]) for part in self.parts]

    def padded(self, sizes: list[int], row: int) -> GroupedTokens:
        """Each group padded to its size, as PassTokens.padded does it."""
        groups = [self.tokens.part(part).padded(size, row) for part, size in zip(self.parts, sizes, strict=True)]
        starts = np.cumsum([0, *sizes[:-1]])
        counts = zip(starts, self.counts, strict=True)
        slots = [group.lora_slot_of_token for group in groups if group.lora_slot_of_token is not None]
        return GroupedTokens(
            own=groups[self.own],
            own_group=self.own,
            sizes=sizes,
            rows=np.concatenate([group.row_of_token for group in groups]),
            ids=np.concatenate([group.ids for group in groups]),
            lora_slots=np.concatenate(slots) if slots else None,
            places=np.concatenate([start + np.arange(count, dtype=np.int64) for start, count in counts]),
        )


def _lora_slots(sequences: Sequence[SequencePlan]) -> np.ndarray | None:
    slots = [sequence.lora_slot for sequence in sequences]
    return np.array(slots, dtype=np.int32) if any(slot >= 0 for slot in slots) else None
