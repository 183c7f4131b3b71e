"""Owns the rules of admission and retraction within one attention group: the order, a pass's limits, who gives way."""

from collections.abc import Iterator, Sequence

from ramet.srt.managers.schedule_batch import Req, RunningReq
from ramet.srt.mem_cache.request_cache import PrefixMatch, RequestCache

LPM_LIMIT = 128  # with more waiting requests, matching each of them costs more than the order gains


class Candidate:
    """A waiting request with the prefix that the cache has of it, which is looked for once."""

    def __init__(self, req: Req, cache: RequestCache):
        self.req = req
        self.fill_ids = req.fill_ids
        self._cache = cache
        self._match = cache.match(self.fill_ids[: req.max_prefix_len])

    @property
    def match(self) -> PrefixMatch:
        """What the cache has of it; found again if something has been evicted for another request meanwhile."""
        if not self._cache.is_current(self._match):
            self._match = self._cache.match(self.fill_ids[: self.req.max_prefix_len])
        return self._match


def order_waiting(queue: Sequence[Req], cache: RequestCache, policy: str) -> Iterator[Candidate]:
    """The waiting requests in the order in which they are tried.

    Under "lpm" retracted requests come first, then those with the longest cached prefix; under "fcfs" and in a long
    queue each is matched when its turn comes.
    """
    if policy == "fcfs" or cache.tree.disabled or len(queue) > LPM_LIMIT:
        return (Candidate(req, cache) for req in queue)
    candidates = [Candidate(req, cache) for req in queue]
    candidates.sort(key=lambda candidate: (not candidate.req.output_ids, -len(candidate.match.pages)))
    return iter(candidates)


class PrefillAdder:
    """Fills one prefill pass within its token budget and the free KV cache.

    Args:
        budget: prompt tokens that the pass may compute.
        reserve_pages: pages to leave for the requests that are decoding.
    """

    def __init__(self, cache: RequestCache, budget: int, reserve_pages: int, max_new_reqs: int):
        self.cache = cache
        self.budget = budget
        self.reserve_pages = reserve_pages
        self.max_new_reqs = max_new_reqs
        self.reqs: list[RunningReq] = []
        self.chunked_req: RunningReq | None = None  # the one whose prompt the budget has cut; None if there is none
        self._first_pages: set[tuple[int, ...]] = set()

    def add_chunked(self, running: RunningReq) -> None:
        """Go on with the request whose prompt did not fit into the last pass. It holds its pages already."""
        self._take(running, running.req.fill_ids)

    def add(self, candidate: Candidate) -> bool:
        """Add a waiting request, which runs from now on; False when no further one can be added."""
        if self.chunked_req is not None or len(self.reqs) >= self.max_new_reqs or self.cache.num_available_rows == 0:
            return False
        if self.budget <= 0:
            return False
        req, match = candidate.req, candidate.match
        num_wanted = 0
        if self.reqs or self.reserve_pages:  # else nobody would make room for it
            num_wanted = self.cache.num_pages(req.num_tokens + 1) - len(match.pages) + self.reserve_pages
        handle = self.cache.begin(match, req.num_tokens, num_wanted)
        if handle is None:
            return False
        if not req.output_ids:
            req.cached_tokens = handle.kv_len
        self._take(RunningReq(req, handle), candidate.fill_ids)
        return True

    def shares_uncached_prefix(self, candidate: Candidate) -> bool:
        """Whether this pass computes the page that comes behind the request's cached prefix.

        It then waits for the next pass and finds the page in the cache.
        """
        if self.cache.tree.disabled or not self._first_pages:
            return False
        start = len(candidate.match.pages) * self.cache.page_size
        return self._next_page(candidate.req, candidate.fill_ids, start) in self._first_pages

    def _next_page(self, req: Req, fill_ids: list[int], start: int) -> tuple[int, ...]:
        """The sequence up to the end of the page at `start`; empty if that page can't be shared."""
        page_end = start + self.cache.page_size
        return tuple(fill_ids[:page_end]) if page_end <= req.max_prefix_len else ()

    def _take(self, running: RunningReq, fill_ids: list[int]) -> None:
        start = running.handle.kv_len
        missing = running.seq_len - start
        running.extend_len = min(missing, self.budget)
        self.budget -= running.extend_len
        if running.extend_len < missing:
            self.chunked_req = running
        next_page = self._next_page(running.req, fill_ids, start)
        if next_page:
            self._first_pages.add(next_page)
        self.reqs.append(running)


def pick_retracted(reqs: Sequence[RunningReq]) -> RunningReq:
    """The running request that loses least by starting over: the fewest output tokens, then the shortest prompt."""
    return min(reqs, key=lambda running: (len(running.req.output_ids), len(running.req.origin_input_ids)))
