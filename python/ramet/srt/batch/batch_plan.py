"""Owns what the scheduler tells the ranks of its replica to compute, and what they answer. Pure data, no torch."""

import msgspec

from ramet.srt.sampling.sampling_state import SamplingState

LAST_TOKEN = -1  # in place of an input id: the token that the row's last pass chose and that only the ranks know yet


class PageWrite(msgspec.Struct, array_like=True):
    """Set the KV pages of a request's table row from page index `start` on."""

    row: int
    start: int
    pages: list[int]
    is_long: bool = False  # whether the sequence is beyond the length up to which the first set of frequencies counts


class PlaceWrite(msgspec.Struct, array_like=True):
    """Give pages of an attention group's KV cache other places in the layers with a sliding window."""

    group: int
    pages: list[int]
    places: list[int]  # 0: none


class StateMoves(msgspec.Struct, array_like=True):
    """What becomes of the states that an attention group's linear layers keep."""

    group: int
    rows: list[int]  # of the page table
    slots: list[int]  # where their states are from now on
    sources: list[int] = []  # slots that are copied before the pass, one after the other
    targets: list[int] = []
    kept_sources: list[int] = []  # and behind it
    kept_targets: list[int] = []


class Pooling(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """What is wanted of a prompt's last token by a request that generates nothing: one vector of float32."""

    label_token_ids: list[int] = []  # their log-probabilities behind the prompt; empty: the token's hidden state
    dimensions: int | None = None  # of a hidden state: so many of its first numbers
    normalize: bool = False  # to length 1, in the end


class SequencePlan(msgspec.Struct, array_like=True, kw_only=True):
    """One sequence's part of a pass: any number of new tokens."""

    rid: str
    row: int  # of the page table
    start: int  # tokens in the KV cache before the pass
    input_ids: list[int]  # the new tokens; LAST_TOKEN may stand for one that is alone
    is_sampled: bool  # whether a token comes out
    group: int = 0  # attention group that computes its attention; the sequences of a plan are in the groups' order
    logprob_offset: int = 0  # first new token whose logits give a prompt log-probability
    logprob_targets: list[int] = []  # the tokens behind it and those after it
    top_logprobs_num: int = 0
    pooling: Pooling | None = None  # of the last new token, where it is the last of a prompt that only this is asked of
    lora_slot: int = -1  # whose adapter all of its tokens have; -1: none
    saves: list[tuple[int, int]] = []  # (new tokens, fewer than all, after which its state is kept once more, slot)

    @property
    def gains_a_token(self) -> bool:
        """Whether one token goes in and one comes out, and nothing else is asked."""
        return len(self.input_ids) == 1 and self.is_sampled and not self.logprob_targets


class LoraPlacement(msgspec.Struct, array_like=True, frozen=True):
    """Put an adapter that the ranks have loaded into a slot, before the pass."""

    slot: int
    lora_id: int


class SharedPrefix(msgspec.Struct, array_like=True, frozen=True):
    """Sequences that stand side by side in a pass, and whose first tokens lie in the same pages."""

    first: int  # sequence of the pass
    num_sequences: int  # at least 2
    num_tokens: int  # that they share, whole pages


class BatchPlan(msgspec.Struct, kw_only=True, tag=True):
    """One forward pass, in full: a rank that has run all plans before it needs nothing else.

    Prompt chunks and single tokens of requests that decode may stand side by side in it.
    """

    sequences: list[SequencePlan]
    shared: list[SharedPrefix] = []  # of sequences that gain a token each
    page_writes: list[PageWrite]
    place_writes: list[PlaceWrite] = []
    state_moves: list[StateMoves] = []
    lora_placements: list[LoraPlacement] = []
    new_states: list[SamplingState]
    ended_rids: list[str]  # states that are no longer needed
    grammar_masks: dict[str, bytes]  # rid -> one bit for each token of the vocabulary, int32 words, lowest bit first

    @property
    def is_decode(self) -> bool:
        """Whether every sequence gains a token from its newest one."""
        return all(sequence.gains_a_token for sequence in self.sequences)


class LogprobRows(msgspec.Struct, kw_only=True):
    """Log-probabilities of a number of rows."""

    logprobs: list[float]  # of the token of each row
    top_logprobs: list[list[float]]
    top_token_ids: list[list[int]]
    ranks: list[int] = []  # of the token of each row in the vocabulary, 1 the likeliest; [] of output tokens

    def extend(self, rows: "LogprobRows") -> None:
        """Append other rows."""
        self.logprobs += rows.logprobs
        self.top_logprobs += rows.top_logprobs
        self.top_token_ids += rows.top_token_ids
        self.ranks += rows.ranks


class BatchResult(msgspec.Struct, kw_only=True):
    """What a pass gave."""

    token_ids: list[int]  # of the sampled sequences, in the plan's order
    output_logprobs: dict[str, LogprobRows]  # rid -> one row, for the sequences that asked
    prompt_logprobs: dict[str, LogprobRows]  # rid -> a row for each of the sequence's logprob_targets
    vectors: dict[str, bytes] = {}  # rid -> float32, of the sequences with a pooling; b"" where one isn't finite
