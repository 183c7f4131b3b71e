"""Owns how many prompt tokens a pass may compute: what lets it end in time, learnt from the passes before it."""

from bisect import bisect_right
from collections.abc import Sequence

START_TOKENS = 1024  # until a pass has shown what prompt tokens cost
MIN_TOKENS = 128  # so that prompts advance however slow the passes are; on a GPU so few are nearly free
ALONE_TARGETS = 2.5  # that a pass may take beside which nothing decodes: only those wait for it that come meanwhile
BACKLOG_PASSES = 12  # that prompts must wait for, before passes may take longer for all of them to be done sooner
MAX_GROWTH = 2  # how far beyond the largest chunk that was measured the estimate is trusted


class TokenBudget:
    """The prompt tokens of a pass, beside which requests decode or not.

    Two running averages say what a pass takes: `base_s`, without prompt tokens, and `token_s`, for each prompt token
    beyond that. Of the target, the part that `base_s` leaves is filled with prompt tokens, at least MIN_TOKENS and at
    most the limit; where nothing decodes, that of ALONE_TARGETS as long. Where prompts of more than BACKLOG_PASSES such
    passes wait, the target grows with their number, up to its most: each pass takes time that is no prompt's.

    An average takes half of what is new, and of that no more than twice and no less than half of itself: an outlier
    moves it by half, and a change is learnt within a few passes.

    The first tokens of a pass are nearly free, as reading the weights takes most of its time. So chunks that are small
    for the budget teach nothing, unless the pass has missed the target or is the first, and the budget is at most twice
    what was measured. Where it settles, a full pass takes the target whatever it is made of, also behind a long prefix,
    where tokens get dearer.

    Args:
        limit: most prompt tokens in one pass.
        target_s: seconds that a pass should take at most; 0: no target, so that the limit alone holds.
        most_s: the same while many prompts wait.
        pass_sizes: tokens of passes that are computed as they are, rising; a shorter one is padded to the next. A
            budget within their range fills one of them.
    """

    def __init__(self, limit: int, target_s: float, most_s: float, pass_sizes: Sequence[int] = ()):
        self.limit = limit
        self._target_s = target_s
        self._most_s = most_s
        self._pass_sizes = pass_sizes
        self._base_s = 0.0
        self._token_s = 0.0
        self._num_measured = 0  # prompt tokens of the newest pass that has taught something

    @property
    def token_s(self) -> float:
        """Seconds that a prompt token takes; 0.0 as long as nothing is known."""
        return self._token_s

    def num_tokens(self, is_decoding: bool, num_others: int = 0, num_waiting: int = 0) -> int:
        """Prompt tokens that the next pass may compute.

        Args:
            is_decoding: whether any request waits for its next token meanwhile.
            num_others: tokens of the pass beside them.
            num_waiting: prompt tokens that wait for it and for later ones.
        """
        if not self._target_s:
            return self.limit
        if is_decoding:
            wanted = self._wanted()
            if self._token_s and (num_passes := num_waiting / wanted) > BACKLOG_PASSES:
                longer_s = min(self._most_s, self._target_s * num_passes / BACKLOG_PASSES)
                wanted = max(wanted, min(self._num_within(longer_s), MAX_GROWTH * self._num_measured))
        else:
            wanted = self._num_within(ALONE_TARGETS * self._target_s)
        place = bisect_right(self._pass_sizes, wanted + num_others)
        if 0 < place < len(self._pass_sizes):
            return max(MIN_TOKENS, self._pass_sizes[place - 1] - num_others)
        return wanted

    def observe(self, seconds: float, num_tokens: int) -> None:
        """Learn from a pass with so many prompt tokens: it took so long from the end of the one before it."""
        if seconds <= 0.0:
            return
        if num_tokens == 0:
            self._base_s = _blend(self._base_s, seconds)
            return
        self._base_s = min(self._base_s, _blend(self._base_s, seconds))  # without them it would not take longer
        is_full = num_tokens >= (self._wanted() / 2 if self._num_measured else min(self.limit, MIN_TOKENS))
        if is_full or (self._num_measured and self._target_s and seconds > self._target_s):
            self._token_s = _blend(self._token_s, max(0.0, seconds - self._base_s) / num_tokens)
        if is_full:
            self._num_measured = num_tokens

    def forget(self) -> None:
        """Learn anew."""
        self._base_s = self._token_s = 0.0
        self._num_measured = 0

    def _wanted(self) -> int:
        """Prompt tokens that make a pass take the target, as far as is known."""
        wanted: float = START_TOKENS
        if self._num_measured and self._target_s:
            wanted = MAX_GROWTH * self._num_measured
            if self._token_s:
                wanted = min(wanted, (self._target_s - self._base_s) / self._token_s)
        return min(self.limit, max(MIN_TOKENS, int(wanted)))

    def _num_within(self, seconds: float) -> int:
        """Prompt tokens that a pass of so long has, as far as that is known."""
        if not self._token_s:
            return self.limit
        return min(self.limit, max(MIN_TOKENS, int((seconds - self._base_s) / self._token_s)))


def _blend(average: float, value: float) -> float:
    """The average with a new value in it; the first one as it is."""
    if not average:
        return value
    return (average + min(max(value, average / 2), average * 2)) / 2
