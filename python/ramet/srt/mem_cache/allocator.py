"""Owns which KV cache pages and which rows of the page table are free."""

from ramet.srt.batch.batch_plan import PageWrite


class PageAllocator:
    """Hands out page numbers from 1 to num_pages; page 0 is never given."""

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self._free = list(range(num_pages, 0, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def alloc(self, count: int) -> list[int]:
        """`count` pages. The caller has checked that so many are free."""
        if count == 0:
            return []
        assert count <= len(self._free), f"asked for {count} pages, {len(self._free)} are free"
        pages = self._free[-count:]
        del self._free[-count:]
        return pages

    def free(self, pages: list[int]) -> None:
        self._free.extend(pages)

    def check(self, held: set[int]) -> None:
        """Assert that free pages and the `held` ones are all pages, each once."""
        free = set(self._free)
        assert len(free) == len(self._free), "a KV page was freed twice"
        assert not free & held, f"KV pages {sorted(free & held)[:5]} are both free and held"
        assert len(free) + len(held) == self.num_pages, (
            f"{self.num_pages - len(free) - len(held)} of {self.num_pages} KV pages are lost"
        )


class RowAllocator:
    """Hands out rows of the page table, one for each request that holds KV cache, and notes what is written there."""

    def __init__(self, num_rows: int):
        self._free = list(range(num_rows - 1, -1, -1))
        self._writes: list[PageWrite] = []  # what the ranks have not been told yet

    @property
    def num_free(self) -> int:
        return len(self._free)

    def alloc(self) -> int:
        """A free row. The caller has checked that there is one."""
        return self._free.pop()

    def free(self, row: int) -> None:
        self._free.append(row)

    def write(self, row: int, start: int, pages: list[int], *, is_long: bool = False) -> None:
        """Set the pages of `row` from its page index `start` on; see PageWrite."""
        if pages:
            self._writes.append(PageWrite(row, start, list(pages), is_long))

    def take_writes(self) -> list[PageWrite]:
        """The changes of the page table since the last call, in order."""
        writes, self._writes = self._writes, []
        return writes
