"""Owns which waiting requests join the next prefill pass, and which running ones give way when the cache is full."""

from collections.abc import Sequence

from ramet.srt.managers.schedule_batch import Req
from ramet.srt.mem_cache.request_cache import RequestCache

LPM_LIMIT = 128  # with more waiting requests, matching each of them costs more than the order gains


def order_waiting(queue: list[Req], cache: RequestCache, policy: str) -> None:
    """Sort the waiting queue in place: retracted requests first, then by policy ("lpm" or "fcfs")."""
    if policy == "fcfs" or cache.tree.disabled or len(queue) > LPM_LIMIT:
        return
    matched = {req.rid: len(cache.tree.match_prefix(req.fill_ids[: req.max_prefix_len])[0]) for req in queue}
    queue.sort(key=lambda req: (not req.output_ids, -matched[req.rid]))


class PrefillAdder:
    """Fills one prefill pass within its token budget and the free KV cache.

    Args:
        budget: prompt tokens that the pass may compute; None is without limit.
        reserve_pages: pages to leave for the requests that are decoding.
    """

    def __init__(self, cache: RequestCache, budget: int | None, reserve_pages: int, max_new_reqs: int):
        self.cache = cache
        self.budget = budget
        self.reserve_pages = reserve_pages
        self.max_new_reqs = max_new_reqs
        self.reqs: list[Req] = []
        self.chunked_req: Req | None = None
        self._first_pages: set[tuple[int, ...]] = set()

    def add_chunked(self, req: Req) -> None:
        """Go on with the request whose prompt did not fit into the last pass. It holds its pages already."""
        self._take(req)

    def add(self, req: Req) -> bool:
        """Add a waiting request; False when no further one can be added."""
        if self.chunked_req is not None or len(self.reqs) >= self.max_new_reqs or self.cache.num_available_rows == 0:
            return False
        if self.budget is not None and self.budget <= 0:
            return False
        handle = self.cache.begin(req.fill_ids[: req.max_prefix_len])
        needed = self.cache.num_pages(req.seq_len + 1) - len(handle.pages)
        if needed + self.reserve_pages > self.cache.num_available_pages and (self.reqs or self.reserve_pages):
            self.cache.release(handle, req.fill_ids)
            return False
        if not self.cache.extend(handle, req.seq_len):
            self.cache.release(handle, req.fill_ids)
            return False
        req.handle = handle
        if not req.output_ids:
            req.cached_tokens = handle.kv_len
        self._take(req)
        return True

    def shares_uncached_prefix(self, req: Req) -> bool:
        """Whether this pass computes the page that comes behind the request's cached prefix.

        It then waits for the next pass and finds the page in the cache.
        """
        if self.cache.tree.disabled:
            return False
        return self._next_page(req, self._matched_len(req)) in self._first_pages

    def _matched_len(self, req: Req) -> int:
        pages, _ = self.cache.tree.match_prefix(req.fill_ids[: req.max_prefix_len])
        return len(pages) * self.cache.page_size

    def _next_page(self, req: Req, start: int) -> tuple[int, ...]:
        page_end = start + self.cache.page_size
        if page_end > req.max_prefix_len:
            return ()
        return tuple(req.fill_ids[:page_end])

    def _take(self, req: Req) -> None:
        missing = req.seq_len - req.handle.kv_len
        req.extend_len = missing if self.budget is None else min(missing, self.budget)
        if self.budget is not None:
            self.budget -= req.extend_len
        if req.extend_len < missing:
            self.chunked_req = req
        next_page = self._next_page(req, req.handle.kv_len)
        if next_page:
            self._first_pages.add(next_page)
        self.reqs.append(req)


def pick_retracted(running: Sequence[Req]) -> Req:
    """The running request that loses least by starting over: the fewest output tokens, then the shortest prompt."""
    return min(running, key=lambda req: (len(req.output_ids), len(req.origin_input_ids)))
