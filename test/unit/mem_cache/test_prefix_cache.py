"""The prefix tree and the requests that share it, in any order of calls, against a model that is a few sets."""

from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from ramet.srt.mem_cache.allocator import PageAllocator, RowAllocator
from ramet.srt.mem_cache.radix_cache import RadixCache
from ramet.srt.mem_cache.request_cache import CacheHandle, RequestCache

NUM_PAGES, NUM_ROWS = 12, 4
# The beginning of one of a few texts, and something behind it: so that prefixes are shared and part at many places.
TEXTS = ((0,) * 9, (0,) * 4 + (1,) * 5, (0, 1) * 4, (0, 0, 1) * 3)
TOKENS = st.builds(
    lambda text, length, rest: [*text[:length], *rest],
    st.sampled_from(TEXTS),
    st.integers(0, 9),
    st.lists(st.integers(0, 1), max_size=2),
)
Prefix = tuple[int, ...]


def begin(cache: RequestCache, tokens: list[int]) -> CacheHandle:
    """A handle that holds the longest cached prefix of the tokens, and no pages beside it."""
    handle = cache.begin(cache.match(tokens), 0)
    assert handle is not None, "the pages of a match are there already"
    return handle


@dataclass
class Running:
    """A request as the model sees it."""

    handle: CacheHandle
    tokens: list[int]  # whose keys and values have been computed
    prompt: list[int]  # what is to be computed next


class PrefixCacheMachine(RuleBasedStateMachine):
    """What is in a page is the prefix that ends with it: its keys and values depend on all tokens before.

    `written` says it of each page that has been filled; `cached` are the prefixes that the tree must hold.
    """

    @initialize(page_size=st.integers(1, 3), disabled=st.integers(0, 9).map(lambda number: number == 9))
    def make(self, page_size, disabled):
        self.page_size, self.disabled = page_size, disabled
        self.allocator, self.rows = PageAllocator(NUM_PAGES), RowAllocator(NUM_ROWS)
        self.tree = RadixCache(self.allocator, page_size, disabled)
        self.cache = RequestCache(self.rows, self.allocator, self.tree, page_size)
        self.running: list[Running] = []
        self.written: dict[int, Prefix] = {}
        self.cached: set[Prefix] = set()
        self.table: dict[tuple[int, int], int] = {}  # (row, place) -> page: what the ranks have been told

    # -- The model

    def whole_pages(self, tokens: list[int]) -> list[Prefix]:
        """The prefixes that end where a page does."""
        return [tuple(tokens[:stop]) for stop in range(self.page_size, len(tokens) + 1, self.page_size)]

    def longest_cached(self, tokens: list[int]) -> list[Prefix]:
        found = []
        for prefix in self.whole_pages(tokens):
            if prefix not in self.cached:
                break
            found.append(prefix)
        return found

    def locked(self) -> set[Prefix]:
        """The cached prefixes that running requests stand on."""
        return {prefix for run in self.running for prefix in self.whole_pages(run.tokens)[: run.handle.num_tree_pages]}

    def forget_evicted(self, before: int, num_pages: int) -> None:
        """The tree may choose what goes, but nothing that is in use, nothing below what stays, and not too little.

        Args:
            before: pages that could be evicted.
            num_pages: how many had to go.
        """
        kept = {self.written[page] for page in self.tree.pages()}
        gone = self.cached - kept
        assert not gone & self.locked(), "a page in use was evicted"
        assert all(self.longest_cached(list(prefix))[-1:] == [prefix] for prefix in kept), "a prefix lost its beginning"
        assert len(gone) >= min(num_pages, before) and (num_pages > 0 or not gone)
        assert self.tree.num_evictable_pages == before - len(gone)
        self.cached = kept

    # -- What the scheduler does

    @precondition(lambda self: len(self.running) < NUM_ROWS)
    @rule(prompt=TOKENS)
    def start(self, prompt):
        expected = self.longest_cached(prompt)
        handle = begin(self.cache, prompt)
        assert [self.written[page] for page in handle.pages] == expected
        assert (handle.num_tree_pages, handle.kv_len) == (len(expected), len(expected) * self.page_size)
        self.running.append(Running(handle, prompt[: handle.kv_len], prompt[handle.kv_len :]))

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, NUM_ROWS - 1), count=st.integers(1, 9), sampled=st.integers(0, 1))
    def compute(self, which, count, sampled):
        """A pass over the next tokens of a request: of its prompt, or one behind it."""
        run = self.running[which % len(self.running)]
        handle = run.handle
        new = run.prompt[:count] or [sampled]
        count = len(new)
        missing = self.cache.num_pages(len(run.tokens) + count) - len(handle.pages)
        free, evictable, pages = self.allocator.num_free, self.tree.num_evictable_pages, list(handle.pages)
        assert self.cache.extend(handle, len(run.tokens) + count) == (missing <= free + evictable)
        self.forget_evicted(evictable, max(0, missing - free) if missing <= free + evictable else 0)
        if missing > free + evictable:
            assert handle.pages == pages and self.allocator.num_free == free
            return
        assert handle.pages[: len(pages)] == pages
        first_page = len(run.tokens) // self.page_size
        assert first_page >= handle.num_tree_pages, "a page that others read would be written"
        run.tokens += new
        run.prompt = run.prompt[count:]
        handle.kv_len = len(run.tokens)
        for place, prefix in enumerate(self.whole_pages(run.tokens)):
            if place >= first_page:
                self.written[handle.pages[place]] = prefix

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, NUM_ROWS - 1), is_last_known=st.booleans())
    def share(self, which, is_last_known):
        """The host may not yet know the last token whose keys and values are there."""
        run = self.running[which % len(self.running)]
        known = run.tokens if is_last_known else run.tokens[:-1]
        self.cache.share(run.handle, known)
        if not self.disabled:
            self.cached.update(self.whole_pages(known))
            assert run.handle.num_tree_pages >= len(known) // self.page_size

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, NUM_ROWS - 1))
    def end(self, which):
        run = self.running.pop(which % len(self.running))
        self.cache.release(run.handle, run.tokens)
        if not self.disabled:
            self.cached.update(self.whole_pages(run.tokens))

    @precondition(lambda self: len(self.running) < NUM_ROWS)
    @rule(prompt=TOKENS)
    def serve(self, prompt):
        """A request from its start to its end, or to where the pages did not suffice."""
        self.start(prompt)
        self.compute(len(self.running) - 1, 9, 0)
        self.end(len(self.running) - 1)

    @rule(tokens=TOKENS)
    def match(self, tokens):
        """Asked of what waits, without taking anything."""
        pages, _ = self.tree.match_prefix(tokens)
        assert [self.written[page] for page in pages] == self.longest_cached(tokens)

    @rule(count=st.integers(0, NUM_PAGES))
    def evict(self, count):
        evictable, free = self.tree.num_evictable_pages, self.allocator.num_free
        freed = self.tree.evict(count)
        assert self.allocator.num_free == free + freed
        self.forget_evicted(evictable, count)

    @precondition(lambda self: not self.running)
    @rule()
    def flush(self):
        self.cache.flush()
        self.cached.clear()
        assert self.allocator.num_free == NUM_PAGES

    # -- What holds at any time

    @invariant()
    def every_page_is_in_one_place(self):
        self.cache.check([run.handle for run in self.running])
        own = [page for run in self.running for page in run.handle.pages[run.handle.num_tree_pages :]]
        assert self.allocator.num_free + len(self.tree.pages()) + len(own) == NUM_PAGES
        assert self.rows.num_free == NUM_ROWS - len(self.running)
        assert self.cache.num_available_pages == self.allocator.num_free + len(self.cached - self.locked())

    @invariant()
    def the_tree_holds_each_cached_prefix_once(self):
        pages = self.tree.pages()
        assert {self.written[page] for page in pages} == self.cached and len(pages) == len(self.cached)
        assert self.tree.num_locked_pages == len(self.locked())

    @invariant()
    def requests_read_their_own_tokens(self):
        for write in self.rows.take_writes():
            self.table.update({(write.row, write.start + place): page for place, page in enumerate(write.pages)})
        for run in self.running:
            told = [self.table[run.handle.row, place] for place in range(len(run.handle.pages))]
            assert told == run.handle.pages
            prefixes = self.whole_pages(run.tokens)
            assert [self.written[page] for page in told[: len(prefixes)]] == prefixes

    @invariant()
    def what_several_begin_with_is_found(self):
        """In the same pages for all of them; no other beginning saves as many reads if it is read once."""
        assert self.tree._num_shared_edges == sum(edge.lock_ref > 1 for edge in self.tree._edges())
        held = [self.whole_pages(run.tokens)[: run.handle.num_tree_pages] for run in self.running]
        pages_of: dict[int, set[tuple[int, ...]]] = {}
        for run, own in zip(self.running, held, strict=True):
            saved = [(sum(one in other for other in held) - 1) * place for place, one in enumerate(own, 1)]
            common = self.cache.common_prefix(run.handle)
            assert (common is not None) == any(saved)
            if common is not None:
                num_pages = common.num_tokens // self.page_size
                assert saved[num_pages - 1] == max(saved)
                pages_of.setdefault(id(common.end), set()).add(tuple(run.handle.pages[:num_pages]))
        assert all(len(same) == 1 for same in pages_of.values())


TestPrefixCache = PrefixCacheMachine.TestCase
TestPrefixCache.settings = settings(max_examples=120, stateful_step_count=40, deadline=None, derandomize=True)


def test_what_was_used_least_lately_goes_first():
    allocator = PageAllocator(6)
    tree = RadixCache(allocator, page_size=2)
    old, new, tail = ([1, 1, 2, 2], [3, 3], [1, 1, 4, 4])
    tree.insert(old, [1, 2])
    tree.insert(new, [3])
    tree.insert(tail, [1, 4])  # shares the first page of `old`
    allocator.alloc(4)
    tree.match_prefix(old)
    assert tree.evict(1) == 1 and not tree.match_prefix(new)[0]
    assert tree.evict(1) == 1 and tree.match_prefix(tail)[0] == [1]
    assert tree.match_prefix(old)[0] == [1, 2]


def test_each_adapter_has_a_tree_of_its_own():
    allocator = PageAllocator(8)
    tree = RadixCache(allocator, 2)
    pages = {lora_id: allocator.alloc(2) for lora_id in (0, 1, 2)}
    for lora_id, own in pages.items():
        assert tree.insert([5, 6, 7, 8], own, lora_id) == 0
    for lora_id, own in pages.items():
        found, node = tree.match_prefix([5, 6, 7, 8, 9], None, lora_id)
        assert found == own
        tree.lock(node)
        assert tree.common_prefix(node) is None
        tree.unlock(node)
    assert tree.pages() == {page for own in pages.values() for page in own}
    assert tree.drop(1) == 2 and tree.drop(3) == 0
    assert [tree.match_prefix([5, 6], None, lora_id)[0] for lora_id in (0, 1, 2)] == [pages[0][:1], [], pages[2][:1]]
    assert (allocator.num_free, tree.num_evictable_pages) == (4, 4)
    assert tree.evict(4) == 4 and allocator.num_free == 8
