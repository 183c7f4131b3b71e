"""Owns the order in which prompts are computed: each has a place, and the one with the smallest comes first.

Under every policy those come first that have run before: they have waited already.

- "deadline": a prompt should be computed by its arrival and STRETCH times what the rest of it takes by itself. So a
  short one passes a long one that has only just come, and nobody who comes after that time passes it. What the prefix
  cache has takes no time.
- "lpm": the longest prefix in the cache first, the computed part of a prompt included; but before them, by deadline,
  those whose deadline is PATIENCE_S ago.
- "fcfs": by arrival.
- "priority": by arrival, which counts as AGING_S earlier for each level of a request's priority. So the highest comes
  first, but nobody waits for ever: whoever has waited AGING_S longer is as good as one of the next level.
"""

from ramet.srt.managers.schedule_batch import Req, RunningReq
from ramet.srt.mem_cache.request_cache import PrefixMatch, RequestCache

STRETCH = 4.0
PATIENCE_S = 2.0
AGING_S = 10.0
MAX_SHARE = 0.75  # of a pass's prompt tokens that one prompt may take while others want some, too

Place = tuple[float, ...]


class Candidate:
    """A waiting request with the prefix that the cache has of it, which is looked for once, when it is asked for."""

    def __init__(self, req: Req, cache: RequestCache):
        self.req = req
        self._cache = cache
        self._match: PrefixMatch | None = None

    @property
    def match(self) -> PrefixMatch:
        """What the cache has of it; found again if something has been evicted for another request meanwhile."""
        if self._match is None or not self._cache.is_current(self._match):
            self._match = self._cache.match(self.req.fill_ids, self.req.max_prefix_len, self.req.lora_id)
        return self._match

    @property
    def missing_len(self) -> int:
        """Tokens that are to be computed before the next one can be chosen."""
        return self.req.num_tokens - len(self.match.pages) * self._cache.page_size


def place_of(prompt: Candidate | RunningReq, policy: str, token_s: float, now_s: float) -> Place:
    """Where a prompt stands that waits, or of which a part is computed.

    Args:
        token_s: seconds that a prompt token takes.
        now_s: on the clock of the arrivals.
    """
    req = prompt.req
    assert req.arrival_s is not None
    if policy == "fcfs":
        return not req.has_run, req.arrival_s
    if policy == "priority":
        return not req.has_run, aged_arrival_s(req)
    deadline_s = req.arrival_s + STRETCH * token_s * prompt.missing_len
    if policy == "deadline":
        return not req.has_run, deadline_s
    is_late = deadline_s + PATIENCE_S <= now_s
    return not req.has_run, not is_late, deadline_s if is_late else prompt.missing_len - req.num_tokens


def aged_arrival_s(req: Req) -> float:
    """When a request of priority 0 would have to come to stand where this one does."""
    assert req.arrival_s is not None
    return req.arrival_s - AGING_S * req.priority


def max_share(policy: str) -> float:
    """Of a pass's prompt tokens that one prompt may take while others want some, too."""
    return 1.0 if policy == "fcfs" else MAX_SHARE


def retraction_cost(running: RunningReq, cache: RequestCache) -> tuple[bool, int, float]:
    """What is lost by taking a request's KV cache away; the request with the least should give way.

    Of those that free a page at all it is the tokens to be computed again, twice as many for each time that the request
    has given way before; of equal ones it is the one that came last.
    """
    req, handle = running.req, running.handle
    assert req.arrival_s is not None
    num_shared = cache.num_shared_pages(handle)
    num_lost = handle.kv_len - num_shared * cache.page_size
    return num_shared == len(handle.pages), num_lost << req.num_retractions, -req.arrival_s
