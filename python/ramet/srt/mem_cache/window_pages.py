"""Owns which pages of a KV cache have their place in the layers with a sliding window, which keep no others.

A page of a sequence is one of the cache's pages in the layers that see everything, and by a map another one, of fewer,
in those with a window: while a request may see it, and behind that as long as nobody else needs the place, so that a
prefix can be given to others.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ramet.srt.mem_cache.allocator import PageAllocator


@dataclass(frozen=True)
class WindowCapacity:
    """What the layers with a window keep."""

    window: int  # tokens that a query sees, itself included
    num_pages: int  # enough for all requests that run, and what a pass computes


class WindowPages:
    """The places of one attention group's pages in the layers with a window.

    Args:
        num_pages: of the cache.
    """

    def __init__(self, capacity: WindowCapacity, num_pages: int, page_size: int):
        self._window = capacity.window
        self._page_size = page_size
        self._places = PageAllocator(capacity.num_pages)
        self._of = [0] * (num_pages + 1)  # place of each page; 0: none
        self._num_users = [0] * (num_pages + 1)  # running requests that may see it
        self._idle: dict[int, None] = {}  # pages with a place that nobody uses, the longest unused first
        self._changed: dict[int, None] = {}  # pages whose places the ranks have not been told of

    def first_seen(self, num_tokens: int) -> int:
        """Index of the first page of a sequence that its token behind so many sees."""
        return max(0, num_tokens - self._window + 1) // self._page_size

    def longest_prefix(self, pages: Sequence[int]) -> int:
        """How many of the first pages of a sequence others can take: what comes behind must see the last ones."""
        run, best = 0, 0
        for index, page in enumerate(pages, 1):
            run = run + 1 if self._of[page] else 0
            if run >= index - self.first_seen(index * self._page_size):
                best = index
        return best

    def use(self, page: int) -> bool:
        """A request may see this page from now on. Returns whether another one, that nobody used, lost its place."""
        evicts = False
        if not self._of[page]:
            if not self._places.num_free:
                evicts = True
                self.forget(next(iter(self._idle)))
            self._set(page, self._places.alloc(1)[0])
        self._idle.pop(page, None)
        self._num_users[page] += 1
        return evicts

    def leave(self, page: int) -> None:
        """A request sees this page no more."""
        self._num_users[page] -= 1
        if not self._num_users[page]:
            self._idle[page] = None

    def replace(self, own: int, other: int) -> None:
        """A request uses a page of the same content instead of its own one, which it used alone."""
        if not self._of[other]:
            self._set(other, self._of[own])
            self._set(own, 0)
        self._idle.pop(other, None)
        self._num_users[other] += 1
        self._num_users[own] -= 1
        self.forget(own)

    def forget(self, page: int) -> None:
        """What a page holds is of no use to anybody."""
        assert not self._num_users[page], "a KV page in use has lost its place"
        self._idle.pop(page, None)
        if self._of[page]:
            self._places.free([self._of[page]])
            self._set(page, 0)

    def _set(self, page: int, place: int) -> None:
        self._of[page] = place
        self._changed[page] = None

    def take_writes(self) -> list[tuple[int, int]]:
        """(page, place or 0) for those that have changed since the last call."""
        writes = [(page, self._of[page]) for page in self._changed]
        self._changed = {}
        return writes

    def check(self, in_use: Sequence[int]) -> None:
        """Assert that each place is of one page, and that pages are used as often as `in_use` has them."""
        places = [place for place in self._of if place]
        assert len(set(places)) == len(places), "a place has two KV pages"
        self._places.check(set(places))
        assert sum(self._num_users) == len(in_use), "KV pages are used of which no request knows"
        assert all(self._of[page] for page in in_use), "a KV page in use has no place"


class WindowedPageAllocator(PageAllocator):
    """A cache's pages, which lose their places with their content."""

    def __init__(self, num_pages: int, windows: WindowPages):
        super().__init__(num_pages)
        self._windows = windows

    def free(self, pages: list[int]) -> None:
        for page in pages:
            self._windows.forget(page)
        super().free(pages)
