"""Owns what prompts get of one pass: its tokens, and the KV cache that is free in their attention groups."""

from collections.abc import Sequence

from ramet.srt.managers.lora_slots import LoraRoom
from ramet.srt.managers.schedule_batch import Req, RunningReq
from ramet.srt.managers.schedule_policy import Candidate
from ramet.srt.mem_cache.radix_cache import TreeNode
from ramet.srt.mem_cache.request_cache import RequestCache

PageInTree = tuple[TreeNode | int, ...]  # the place in the prefix tree behind which it comes, and its tokens


class GroupRoom:
    """What is left of one attention group's KV cache while a pass is filled.

    Args:
        reserve_pages: pages to leave for the requests that run in it.
    """

    def __init__(self, cache: RequestCache, reserve_pages: int):
        self._cache = cache
        self._reserve_pages = reserve_pages
        self._has_others = reserve_pages > 0  # requests whose end makes room
        self._is_closed = False  # one found no room, and nobody behind it may take what it waits for
        self._first_pages: set[PageInTree] = set()  # that the pass completes of each prompt

    def begin(self, candidate: Candidate) -> RunningReq | None:
        """Let a waiting request run, if there is room for it."""
        if self._is_closed or self._shares_uncached_prefix(candidate):
            return None
        req, match, num_wanted = candidate.req, candidate.match, 0
        if self._has_others:
            num_wanted = self._cache.num_pages(req.num_tokens + 1) - len(match.pages) + self._reserve_pages
        handle = self._cache.begin(match, req.num_tokens, num_wanted)
        if handle is None:
            self._is_closed = True
            return None
        if not req.has_run:
            req.cached_tokens = handle.kv_len
        self._has_others = True
        return RunningReq(req, handle)

    def note(self, running: RunningReq) -> None:
        """The pass computes a part of this request's prompt."""
        handle = running.handle
        page = self._page(running.req, handle.node, handle.kv_len // self._cache.page_size)
        if page is not None:
            self._first_pages.add(page)

    def _shares_uncached_prefix(self, candidate: Candidate) -> bool:
        """Whether this pass computes the page that comes behind the request's cached prefix.

        It then waits for the next pass and finds the page in the cache.
        """
        if self._cache.tree.disabled or not self._first_pages:
            return False
        match = candidate.match
        return self._page(candidate.req, match.node, len(match.pages)) in self._first_pages

    def _page(self, req: Req, node: TreeNode, index: int) -> PageInTree | None:
        """The page of a sequence that comes behind `node`, up to which the cache has it; None if it can't be shared."""
        start = index * self._cache.page_size
        stop = start + self._cache.page_size
        return (node, *req.token_ids(start, stop)) if stop <= req.max_prefix_len else None


class PrefillAdder:
    """Fills one pass with prompts, which are tried in their order.

    Args:
        budget: prompt tokens that the pass may compute.
        max_share: of them that one prompt gets at first; what is left in the end goes to the first that was cut.
        lora_room: what the pass has for requests with adapters.
    """

    def __init__(self, rooms: Sequence[GroupRoom], budget: int, max_share: float, lora_room: LoraRoom):
        self.budget = budget
        self._rooms = rooms
        self._lora_room = lora_room
        self._max_len = max(1, int(budget * max_share))
        self.reqs: list[RunningReq] = []

    def add(self, running: RunningReq) -> None:
        """Compute a chunk of a prompt. Its request holds its pages already."""
        running.extend_len = min(running.missing_len, self.budget, self._max_len)
        self.budget -= running.extend_len
        self._rooms[running.group].note(running)
        self.reqs.append(running)

    def begin(self, candidate: Candidate) -> bool:
        """Let a waiting request run, and compute a chunk of its prompt; whether there was room for it."""
        lora_id = candidate.req.lora_id
        if not self._lora_room.has_room(lora_id):
            return False
        running = self._rooms[candidate.req.group].begin(candidate)
        if running is None:
            return False
        running.lora_slot = self._lora_room.take(lora_id)
        self.add(running)
        return True

    def top_up(self) -> None:
        """Give what is left of the budget to those that have been cut."""
        for running in self.reqs:
            more = min(running.missing_len - running.extend_len, self.budget)
            running.extend_len += more
            self.budget -= more
