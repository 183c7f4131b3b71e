"""The page and row allocators in any order of calls, against a set of what was given out."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from ramet.srt.mem_cache.allocator import PageAllocator, RowAllocator


class PageAllocatorMachine(RuleBasedStateMachine):
    """No page is lost, none is given twice, and page 0, where padding goes, never is."""

    @initialize(num_pages=st.integers(1, 12))
    def make(self, num_pages):
        self.num_pages = num_pages
        self.allocator = PageAllocator(num_pages)
        self.held: list[int] = []

    @rule(share=st.floats(0, 1))
    def alloc(self, share):
        count = round(share * self.allocator.num_free)
        pages = self.allocator.alloc(count)
        assert len(set(pages)) == len(pages) == count
        assert not set(pages) & set(self.held) and set(pages) <= set(range(1, self.num_pages + 1))
        self.held += pages

    @precondition(lambda self: self.held)
    @rule(start=st.integers(0, 11), count=st.integers(1, 12))
    def free(self, start, count):
        start %= len(self.held)
        pages = self.held[start : start + count]
        del self.held[start : start + count]
        self.allocator.free(pages)

    @invariant()
    def every_page_is_in_one_place(self):
        assert self.allocator.num_free + len(self.held) == self.num_pages
        self.allocator.check(set(self.held))


TestPageAllocator = PageAllocatorMachine.TestCase
TestPageAllocator.settings = settings(max_examples=60, stateful_step_count=30, deadline=None, derandomize=True)


def test_what_went_wrong_is_noticed():
    """`check` guards the engine's own book-keeping, so it must see each way to get that wrong."""
    allocator = PageAllocator(3)
    pages = allocator.alloc(2)
    with pytest.raises(AssertionError, match="lost"):
        allocator.check({pages[0]})
    allocator.free(pages)
    with pytest.raises(AssertionError, match="both free and held"):
        allocator.check({pages[0]})
    allocator.free(pages[:1])
    with pytest.raises(AssertionError, match="freed twice"):
        allocator.check(set())
    with pytest.raises(AssertionError, match="asked for 9 pages"):
        allocator.alloc(9)


def test_rows_are_given_once_and_their_writes_told_in_order():
    rows = RowAllocator(2)
    first, second = rows.alloc(), rows.alloc()
    assert {first, second} == {0, 1} and rows.num_free == 0
    pages = [5, 6]
    rows.write(first, 0, pages)
    pages.append(7)  # the caller goes on with its list; what was written stays
    rows.write(first, 2, [])
    rows.write(second, 1, [8])
    assert [(write.row, write.start, write.pages) for write in rows.take_writes()] == [
        (first, 0, [5, 6]),
        (second, 1, [8]),
    ]
    assert rows.take_writes() == []
    rows.free(first)
    assert rows.num_free == 1 and rows.alloc() == first
