"""Owns what a request holds of the KV cache: its table row, its pages and its lock on the prefix tree."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ramet.srt.mem_cache.allocator import PageAllocator, RowAllocator
from ramet.srt.mem_cache.prefix_states import PrefixStates, RequestState
from ramet.srt.mem_cache.radix_cache import RadixCache, TreeNode
from ramet.srt.mem_cache.window_pages import WindowPages


@dataclass(slots=True)
class PrefixMatch:
    """The longest cached prefix of some tokens. It holds nothing: what it found may be evicted."""

    pages: list[int]
    node: TreeNode  # where the prefix ends
    lora_id: int  # the adapter that has computed them; 0: none
    num_evictions: int  # of the cache when it was found
    is_long: bool  # see CacheHandle
    branch_len: int = 0  # tokens whose pages are cached, with a state or without


@dataclass(slots=True)
class CacheHandle:
    """One request's share of the KV cache."""

    row: int
    node: TreeNode  # locked while the handle lives
    pages: list[int]
    num_tree_pages: int  # the first pages belong to the prefix tree, the others to the request
    kv_len: int  # tokens whose keys and values are in the pages
    lora_id: int  # the adapter that computes them; 0: none
    is_long: bool  # whether the keys are rotated by the second of two sets of frequencies
    generation: int  # of the prefix tree when the request began
    window_start: int = 0  # of its pages, those from here up to the end below have their places in layers with a window
    window_stop: int = 0
    state: RequestState | None = None  # of linear layers, where there are some


class CommonPrefix(NamedTuple):
    """Tokens with which several running requests begin, in the same pages."""

    end: TreeNode  # equal for all of them
    num_tokens: int


class RequestCache:
    """Gives requests pages, evicting cached prefixes when none are free, and takes them back.

    Args:
        switch_len: see RopeConfig. The keys of longer sequences are others, so such a one has nothing in common with
            shorter ones, and starts over when it grows beyond.
        windows: the pages' places in layers that keep their window alone; None if there are none.
        states: of linear layers; None if there are none.
    """

    def __init__(
        self,
        rows: RowAllocator,
        allocator: PageAllocator,
        tree: RadixCache,
        page_size: int,
        switch_len: int | None = None,
        windows: WindowPages | None = None,
        states: PrefixStates | None = None,
    ):
        self.rows = rows
        self.allocator = allocator
        self.tree = tree
        self.page_size = page_size
        self.switch_len = switch_len
        self.windows = windows
        self.states = states
        self._num_evictions = 0

    @property
    def num_available_pages(self) -> int:
        """Pages that are free or can be made so by eviction."""
        return self.allocator.num_free + self.tree.num_evictable_pages

    @property
    def num_available_rows(self) -> int:
        return self.rows.num_free

    def num_pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def match(self, token_ids: Sequence[int], limit: int | None = None, lora_id: int = 0) -> PrefixMatch:
        """The longest prefix of `token_ids`, or of the first `limit` of them, that is cached of an adapter."""
        is_long = self.switch_len is not None and len(token_ids) > self.switch_len
        tree_ids = _tree_ids(token_ids, is_long)
        pages, node = self.tree.match_prefix(tree_ids, limit, lora_id)
        if self.windows is not None and (num_pages := self.windows.longest_prefix(pages)) < len(pages):
            pages, node = self.tree.match_prefix(tree_ids, num_pages * self.page_size, lora_id)
        branch_len = len(pages) * self.page_size
        if self.states is not None:
            pages, node = self.states.deepest(pages, node)
        return PrefixMatch(pages, node, lora_id, self._evictions, is_long, branch_len)

    @property
    def _evictions(self) -> int:
        """How often something was evicted that a match may have found."""
        return self._num_evictions + (0 if self.states is None else self.states.slots.num_evictions)

    def must_start_over(self, handle: CacheHandle, num_tokens: int) -> bool:
        """Whether the keys that the handle has are not those of a sequence of so many tokens."""
        return self.switch_len is not None and not handle.is_long and num_tokens > self.switch_len

    def is_current(self, match: PrefixMatch) -> bool:
        """Whether nothing has been evicted since, so that the match may still be taken."""
        return match.num_evictions == self._evictions

    def begin(self, match: PrefixMatch, num_tokens: int, num_wanted: int = 0) -> CacheHandle | None:
        """A handle with pages for `num_tokens` in all, the first of which are those of the match, which it takes over.

        The caller has checked that the match is current and that a row is free.

        Args:
            num_wanted: pages that must be available beside those of the match, even if fewer are taken.

        Returns:
            None, and nothing changes, if there are not enough pages, or there is no place for a state.
        """
        if self.states is not None and not self.states.slots.num_available:
            return None
        num_missing = max(0, self.num_pages(num_tokens) - len(match.pages))
        self.tree.lock(match.node)
        if max(num_wanted, num_missing) > self.num_available_pages:
            self.tree.unlock(match.node)
            return None
        self.tree.note_hit(match.node)
        num_cached = len(match.pages)
        pages = match.pages + self._take_pages(num_missing)
        kv_len = num_cached * self.page_size
        row, generation = self.rows.alloc(), self.tree.generation
        handle = CacheHandle(row, match.node, pages, num_cached, kv_len, match.lora_id, match.is_long, generation)
        self.rows.write(handle.row, 0, pages, is_long=handle.is_long)
        if self.windows is not None:
            handle.window_start = handle.window_stop = self.windows.first_seen(kv_len)
            self.see(handle, kv_len)
        if self.states is not None:
            handle.state = self.states.begin(row, match.node, match.branch_len)
        return handle

    def see(self, handle: CacheHandle, num_tokens: int) -> None:
        """Give the handle's pages their places in layers with a window, up to so many tokens, which a pass computes."""
        if self.windows is None:
            return
        while handle.window_stop < self.num_pages(num_tokens):
            self._num_evictions += self.windows.use(handle.pages[handle.window_stop])
            handle.window_stop += 1

    def pass_by(self, handle: CacheHandle) -> None:
        """Give back the places of pages that no later token of the handle sees: passes run in their order.

        Nor one behind its whole pages, up to which its prefix can be given to others.
        """
        if self.windows is None:
            return
        border = handle.kv_len // self.page_size * self.page_size
        start = min(self.windows.first_seen(border), handle.window_stop)
        self._leave(handle, handle.window_start, start)
        handle.window_start = start

    def _leave(self, handle: CacheHandle, start: int, stop: int) -> None:
        """The handle sees those of its pages no more; what is not in the prefix tree is lost."""
        assert self.windows is not None
        for index in range(start, stop):
            self.windows.leave(handle.pages[index])
            if index >= handle.num_tree_pages:
                self.windows.forget(handle.pages[index])

    def plan_states(self, handle: CacheHandle, num_new: int, num_tokens: int | None) -> list[tuple[int, int]]:
        """Which states of the handle the next pass, of so many new tokens, is to keep; see PrefixStates.plan."""
        if self.states is None or handle.state is None or self.tree.disabled or self._is_old(handle):
            return []
        return self.states.plan(handle.state, handle.kv_len, handle.kv_len + num_new, num_tokens)

    def note_states(self, handle: CacheHandle, token_ids: Sequence[int]) -> None:
        """The pass is queued that keeps them. What it computes of a prompt is shared before.

        Args:
            token_ids: of the sequence, as far as it is known.
        """
        if self.states is not None and handle.state is not None:
            num_in_tree = handle.num_tree_pages * self.page_size
            self.states.note_launched(handle.state, _tree_ids(token_ids, handle.is_long), num_in_tree, handle.lora_id)

    def _is_old(self, handle: CacheHandle) -> bool:
        """Whether it was begun with other weights."""
        return handle.generation != self.tree.generation

    def extend(self, handle: CacheHandle, num_tokens: int) -> bool:
        """Give the handle pages for `num_tokens` in all; False, and no change, if there are not enough."""
        missing = self.num_pages(num_tokens) - len(handle.pages)
        if missing <= 0:
            return True
        if missing > self.num_available_pages:
            return False
        pages = self._take_pages(missing)
        self.rows.write(handle.row, len(handle.pages), pages, is_long=handle.is_long)
        handle.pages.extend(pages)
        return True

    def _take_pages(self, count: int) -> list[int]:
        """So many of the available pages."""
        if count > self.allocator.num_free:
            self.tree.evict(count - self.allocator.num_free)
            self._num_evictions += 1
        return self.allocator.alloc(count)

    def share(self, handle: CacheHandle, token_ids: Sequence[int]) -> None:
        """Put the handle's full pages into the prefix tree, for others to use while the request goes on.

        Pages that the tree holds already replace the handle's own copies. Nothing is shared of a request that was
        begun with other weights: what they have made, and what follows on it, is of use to this request alone.

        Args:
            token_ids: of the sequence; the cache may hold one more, which isn't known yet.
        """
        num_full = min(handle.kv_len, len(token_ids)) // self.page_size
        if self.tree.disabled or self._is_old(handle) or num_full <= handle.num_tree_pages:
            return
        token_ids = _tree_ids(token_ids[: num_full * self.page_size], handle.is_long)
        num_held = self.tree.insert(token_ids, handle.pages, handle.lora_id)
        pages, node = self.tree.match_prefix(token_ids, None, handle.lora_id)
        if self.windows is not None:
            for index in range(max(handle.num_tree_pages, handle.window_start), min(num_held, handle.window_stop)):
                self.windows.replace(handle.pages[index], pages[index])
        self.allocator.free(handle.pages[handle.num_tree_pages : num_held])
        self.tree.lock(node)
        self.tree.unlock(handle.node)
        handle.node = node
        if num_held > handle.num_tree_pages:
            new_pages = pages[handle.num_tree_pages : num_held]
            self.rows.write(handle.row, handle.num_tree_pages, new_pages, is_long=handle.is_long)
        handle.pages[:num_full] = pages
        handle.num_tree_pages = num_full

    def num_shared_pages(self, handle: CacheHandle) -> int:
        """Pages of the handle that others hold too, so that they stay when it is released."""
        return self.tree.num_shared_pages(handle.node)

    def common_prefix(self, handle: CacheHandle) -> CommonPrefix | None:
        """What the handle's sequence has in common with others that run, as far as to read it once saves most."""
        found = self.tree.common_prefix(handle.node)
        return CommonPrefix(found[0], found[1] * self.page_size) if found is not None else None

    def release(self, handle: CacheHandle, token_ids: Sequence[int]) -> None:
        """Take everything back; the full pages stay in the prefix tree."""
        self.share(handle, token_ids)
        if self.windows is not None:
            self._leave(handle, handle.window_start, handle.window_stop)
        if self.states is not None and handle.state is not None:
            num_in_tree = 0 if self._is_old(handle) else handle.num_tree_pages * self.page_size
            self.states.release(handle.state, _tree_ids(token_ids, handle.is_long), num_in_tree, handle.lora_id)
        self.allocator.free(handle.pages[handle.num_tree_pages :])
        self.tree.unlock(handle.node)
        self.rows.free(handle.row)

    def drop(self, lora_id: int) -> None:
        """Forget what is cached of an adapter. No handle of it may be alive."""
        if self.tree.drop(lora_id):
            self._num_evictions += 1

    def begin_generation(self) -> None:
        """The weights have changed: nothing that is cached is found again. Handles go on with what they have."""
        self.tree.begin_generation()
        if self.states is not None:
            self.states.slots.drop_all()
        self._num_evictions += 1

    def flush(self) -> None:
        """Drop every cached prefix. No handle may be alive."""
        self.tree.evict(self.tree.num_evictable_pages)
        self.tree.reset()
        if self.states is not None:
            self.states.slots.drop_all()
        self._num_evictions += 1

    def check(self, handles: Sequence[CacheHandle]) -> None:
        """Assert that every page is in exactly one place: free, in the tree, or with one handle."""
        held = self.tree.pages()
        for handle in handles:
            own = handle.pages[handle.num_tree_pages :]
            assert not held.intersection(own), "a KV page has two owners"
            held.update(own)
        self.allocator.check(held)
        if self.windows is not None:
            self.windows.check([page for one in handles for page in one.pages[one.window_start : one.window_stop]])
        if self.states is not None:
            self.states.slots.check([one.state.slot for one in handles if one.state is not None])


def _tree_ids(token_ids: Sequence[int], is_long: bool) -> Sequence[int]:
    """What stands for the tokens in the prefix tree: other numbers where their keys are others, too."""
    return [~token_id for token_id in token_ids] if is_long else token_ids
