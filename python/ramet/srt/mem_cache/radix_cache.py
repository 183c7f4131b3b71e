"""Owns the prefix cache: a radix tree from token ids to the KV pages that hold them, whole pages only."""

import heapq
import itertools
from collections.abc import Sequence

from ramet.srt.mem_cache.allocator import PageAllocator

PageKey = tuple[int, ...]  # the token ids of one page


class TreeNode:
    """An edge of the tree: a run of pages. `lock_ref` counts the running requests that use it or a descendant."""

    __slots__ = ("children", "keys", "last_access", "lock_ref", "pages", "parent")

    def __init__(self, parent: "TreeNode | None", keys: list[PageKey], pages: list[int]):
        self.parent = parent
        self.keys = keys
        self.pages = pages
        self.children: dict[PageKey, TreeNode] = {}
        self.lock_ref = 0
        self.last_access = 0


class RadixCache:
    """Pages of ended and running requests, shared by prefix; the least recently used unlocked leaves are evicted.

    With `disabled`, nothing is ever kept.
    """

    def __init__(self, allocator: PageAllocator, page_size: int, disabled: bool = False):
        self.allocator = allocator
        self.page_size = page_size
        self.disabled = disabled
        self._clock = itertools.count(1)
        self.reset()

    def reset(self) -> None:
        """Forget everything; the pages are the caller's to free."""
        self.root = TreeNode(None, [], [])
        self.root.lock_ref = 1
        self.num_evictable_pages = 0
        self.num_locked_pages = 0

    def match_prefix(self, token_ids: Sequence[int]) -> tuple[list[int], TreeNode]:
        """The pages of the longest cached prefix of `token_ids`, and the node where it ends. Splits nodes."""
        pages: list[int] = []
        node = self.root
        keys = self._page_keys(token_ids)
        start = 0
        while start < len(keys) and (child := node.children.get(keys[start])) is not None:
            length = _common_length(child.keys, keys, start)
            if length < len(child.keys):
                child = self._split(child, length)
            child.last_access = next(self._clock)
            pages.extend(child.pages)
            start += length
            node = child
        return pages, node

    def insert(self, token_ids: Sequence[int], pages: list[int]) -> int:
        """Store the whole pages of `token_ids`; returns how many pages the tree held already.

        Those are not taken over: the caller keeps or frees its own copies of them.
        """
        if self.disabled:
            return 0
        keys = self._page_keys(token_ids)
        held, node = self.match_prefix(token_ids)
        if len(held) < len(keys):
            new = TreeNode(node, keys[len(held) :], pages[len(held) : len(keys)])
            new.last_access = next(self._clock)
            node.children[new.keys[0]] = new
            self.num_evictable_pages += len(new.pages)
        return len(held)

    def lock(self, node: TreeNode) -> None:
        """Keep `node` and its ancestors from eviction."""
        while node.parent is not None:
            if node.lock_ref == 0:
                self.num_evictable_pages -= len(node.pages)
                self.num_locked_pages += len(node.pages)
            node.lock_ref += 1
            node = node.parent

    def unlock(self, node: TreeNode) -> None:
        """Undo one `lock` of the same node."""
        while node.parent is not None:
            node.lock_ref -= 1
            assert node.lock_ref >= 0, "a prefix cache node was unlocked more often than locked"
            if node.lock_ref == 0:
                self.num_evictable_pages += len(node.pages)
                self.num_locked_pages -= len(node.pages)
            node = node.parent

    def evict(self, num_pages: int) -> int:
        """Free at least `num_pages` pages if so many are unlocked; returns how many were freed."""
        leaves = [(node.last_access, id(node), node) for node in self._nodes() if self._is_evictable_leaf(node)]
        heapq.heapify(leaves)
        freed = 0
        while leaves and freed < num_pages:
            node = heapq.heappop(leaves)[2]
            self.allocator.free(node.pages)
            freed += len(node.pages)
            parent = node.parent
            del parent.children[node.keys[0]]
            if self._is_evictable_leaf(parent):
                heapq.heappush(leaves, (parent.last_access, id(parent), parent))
        self.num_evictable_pages -= freed
        return freed

    def pages(self) -> set[int]:
        """Every page that the tree holds."""
        return {page for node in self._nodes() for page in node.pages}

    def _page_keys(self, token_ids: Sequence[int]) -> list[PageKey]:
        if self.disabled:
            return []
        size = self.page_size
        return [tuple(token_ids[start : start + size]) for start in range(0, len(token_ids) - size + 1, size)]

    def _split(self, node: TreeNode, length: int) -> TreeNode:
        """Cut `node` after `length` pages; returns the new upper part."""
        upper = TreeNode(node.parent, node.keys[:length], node.pages[:length])
        upper.lock_ref = node.lock_ref
        upper.last_access = node.last_access
        node.parent.children[upper.keys[0]] = upper
        node.keys, node.pages, node.parent = node.keys[length:], node.pages[length:], upper
        upper.children[node.keys[0]] = node
        return upper

    def _nodes(self) -> list[TreeNode]:
        nodes = list(self.root.children.values())
        for node in nodes:  # the list grows while it is walked
            nodes.extend(node.children.values())
        return nodes

    def _is_evictable_leaf(self, node: TreeNode) -> bool:
        return node.parent is not None and not node.children and node.lock_ref == 0


def _common_length(edge: list[PageKey], keys: list[PageKey], start: int) -> int:
    """Number of pages that `edge` and `keys` from `start` on have in common."""
    limit = min(len(edge), len(keys) - start)
    for index in range(limit):
        if edge[index] != keys[start + index]:
            return index
    return limit
