"""Owns the prefix cache: radix trees from token ids to the KV pages that hold them, whole pages only.

There is a tree for each adapter, by its number: keys and values that one has made are nobody else's. When the weights
change, new trees begin: nothing in the old ones is found again, and what nobody uses of them is evicted as the rest.
"""

import heapq
import itertools
from collections.abc import Callable, Iterable, Sequence

from ramet.srt.mem_cache.allocator import PageAllocator

PageKey = tuple[int, ...]  # the token ids of one page


class TreeNode:
    """A place in the tree where a prefix ends: the root, where the empty one does, or the end of an edge."""

    __slots__ = ("children",)

    def __init__(self) -> None:
        self.children: dict[PageKey, TreeEdge] = {}


class TreeEdge(TreeNode):
    """A run of pages behind a place. `lock_ref` counts the running requests that use it or one behind it."""

    __slots__ = ("keys", "last_access", "lock_ref", "num_hits", "pages", "parent")

    def __init__(self, parent: TreeNode, keys: list[PageKey], pages: list[int], last_access: int):
        super().__init__()
        self.parent = parent
        self.keys = keys
        self.pages = pages
        self.last_access = last_access
        self.lock_ref = 0
        self.num_hits = 0  # requests that have found it


class RadixCache:
    """Pages of ended and running requests, shared by prefix; the least recently used unlocked leaves are evicted.

    With `disabled`, nothing is ever kept.
    """

    def __init__(self, allocator: PageAllocator, page_size: int, disabled: bool = False):
        self.allocator = allocator
        self.page_size = page_size
        self.disabled = disabled
        self._clock = itertools.count(1)
        self.generation = 0  # of the trees in which prefixes are found
        self.on_evict: Callable[[TreeEdge], None] | None = None  # called with each edge that is evicted
        self.reset()

    def reset(self) -> None:
        """Forget everything; the pages are the caller's to free."""
        self._roots: dict[int, TreeNode] = {}  # by the adapter
        self._old_roots: list[TreeNode] = []  # of trees before these
        self.num_evictable_pages = 0
        self.num_locked_pages = 0
        self._num_shared_edges = 0  # that several requests have locked
        self._common: dict[TreeNode, tuple[TreeEdge, int] | None] = {}  # what common_prefix has found, by these locks

    def begin_generation(self) -> int:
        """Find no prefix any more that is cached now, and free what nobody uses; returns how many pages that were."""
        freed = self.evict(self.num_evictable_pages)
        self.generation += 1
        self._old_roots = [root for root in (*self._old_roots, *self._roots.values()) if root.children]
        self._roots = {}
        return freed

    def match_prefix(
        self, token_ids: Sequence[int], limit: int | None = None, lora_id: int = 0
    ) -> tuple[list[int], TreeNode]:
        """The pages of the longest cached prefix of `token_ids`, and the node where it ends. Splits nodes.

        Args:
            limit: tokens that the prefix has at most; None for all.
            lora_id: the adapter that computes them; 0: none.
        """
        pages: list[int] = []
        node = self._roots.get(lora_id)
        if node is None:
            node = self._roots[lora_id] = TreeNode()
        num_pages = self._num_pages(len(token_ids) if limit is None else limit)
        while len(pages) < num_pages:
            child = node.children.get(self._page_key(token_ids, len(pages)))
            if child is None:
                break
            length = self._common_length(child.keys, token_ids, len(pages), num_pages)
            if length < len(child.keys):
                child = self._split(child, length)
            child.last_access = next(self._clock)
            pages.extend(child.pages)
            node = child
        return pages, node

    def insert(self, token_ids: Sequence[int], pages: list[int], lora_id: int = 0) -> int:
        """Store the whole pages of `token_ids`; returns how many pages the tree held already.

        Those are not taken over: the caller keeps or frees its own copies of them.
        """
        if self.disabled:
            return 0
        held, node = self.match_prefix(token_ids, None, lora_id)
        num_pages = self._num_pages(len(token_ids))
        if len(held) < num_pages:
            keys = [self._page_key(token_ids, page) for page in range(len(held), num_pages)]
            new = TreeEdge(node, keys, pages[len(held) : num_pages], next(self._clock))
            node.children[new.keys[0]] = new
            self.num_evictable_pages += len(new.pages)
        return len(held)

    def lock(self, node: TreeNode) -> None:
        """Keep `node` and its ancestors from eviction."""
        self._common.clear()
        while isinstance(node, TreeEdge):
            if node.lock_ref == 0:
                self.num_evictable_pages -= len(node.pages)
                self.num_locked_pages += len(node.pages)
            node.lock_ref += 1
            self._num_shared_edges += node.lock_ref == 2
            node = node.parent

    def unlock(self, node: TreeNode) -> None:
        """Undo one `lock` of the same node."""
        self._common.clear()
        while isinstance(node, TreeEdge):
            node.lock_ref -= 1
            self._num_shared_edges -= node.lock_ref == 1
            assert node.lock_ref >= 0, "a prefix cache node was unlocked more often than locked"
            if node.lock_ref == 0:
                self.num_evictable_pages += len(node.pages)
                self.num_locked_pages -= len(node.pages)
            node = node.parent

    def note_hit(self, node: TreeNode) -> None:
        """A request has found the prefix that ends at `node`."""
        while isinstance(node, TreeEdge):
            node.num_hits += 1
            node = node.parent

    def hottest(self, max_pages: int) -> list[tuple[list[int], int]]:
        """The prefixes that most requests have found, the latest of them first, without those of adapters.

        Args:
            max_pages: of all of them together.

        Returns:
            Runs of pages: what stands for the tokens from the beginning to the end of the run, and the index of its
            first page; those before are in a run before.
        """
        root = self._roots.get(0)
        edges = [] if root is None else _edges_below([root])
        chosen: set[TreeEdge] = set()
        runs: list[tuple[list[int], int]] = []
        for edge in sorted(edges, key=lambda edge: (edge.num_hits, edge.last_access), reverse=True):
            path = _path_to(edge)
            for index, one in enumerate(path):
                if one in chosen:
                    continue
                count = min(len(one.pages), max_pages)
                if count <= 0:
                    return runs
                before = [key for upper in path[:index] for key in upper.keys]
                keys = [token for key in before + one.keys[:count] for token in key]
                runs.append((keys, len(before)))
                chosen.add(one)
                max_pages -= count
        return runs

    def num_shared_pages(self, node: TreeNode) -> int:
        """Pages up to `node`, which is locked, that are locked by others too."""
        num_pages = 0
        while isinstance(node, TreeEdge):
            if node.lock_ref > 1:
                num_pages += len(node.pages)
            node = node.parent
        return num_pages

    def common_prefix(self, node: TreeNode) -> "tuple[TreeEdge, int] | None":
        """Of the prefixes up to `node` that others have locked too, the one that saves most if it is read once.

        Returns:
            Where it ends, and its pages; None if there is none.
        """
        if self._num_shared_edges == 0:
            return None
        if node not in self._common:
            self._common[node] = self._find_common_prefix(node)
        return self._common[node]

    def _find_common_prefix(self, node: TreeNode) -> "tuple[TreeEdge, int] | None":
        best, most_saved, num_pages = None, 0, 0
        for edge in _path_to(node):
            num_pages += len(edge.pages)
            saved = (edge.lock_ref - 1) * num_pages
            if saved > most_saved:
                best, most_saved = (edge, num_pages), saved
        return best

    def evict(self, num_pages: int) -> int:
        """Free at least `num_pages` pages if so many are unlocked; returns how many were freed."""
        return self._evict(num_pages, self._edges())

    def drop(self, lora_id: int) -> int:
        """Free what is cached of an adapter, with which nothing runs; returns how many pages that were."""
        root = self._roots.pop(lora_id, None)
        return 0 if root is None else self._evict(self.num_evictable_pages, _edges_below([root]))

    def _evict(self, num_pages: int, edges: Iterable[TreeEdge]) -> int:
        leaves = [(edge.last_access, id(edge), edge) for edge in edges if _is_evictable_leaf(edge)]
        heapq.heapify(leaves)
        freed = 0
        while leaves and freed < num_pages:
            edge = heapq.heappop(leaves)[2]
            self.allocator.free(edge.pages)
            freed += len(edge.pages)
            if self.on_evict is not None:
                self.on_evict(edge)
            parent = edge.parent
            del parent.children[edge.keys[0]]
            if isinstance(parent, TreeEdge) and _is_evictable_leaf(parent):
                heapq.heappush(leaves, (parent.last_access, id(parent), parent))
        self.num_evictable_pages -= freed
        return freed

    def pages(self) -> set[int]:
        """Every page that the tree holds."""
        return {page for edge in self._edges() for page in edge.pages}

    def _num_pages(self, num_tokens: int) -> int:
        """Whole pages of a sequence that the tree can hold."""
        return 0 if self.disabled else num_tokens // self.page_size

    def _page_key(self, token_ids: Sequence[int], page: int) -> PageKey:
        return tuple(token_ids[page * self.page_size : (page + 1) * self.page_size])

    def _common_length(self, edge: list[PageKey], token_ids: Sequence[int], start: int, stop: int) -> int:
        """Number of pages that `edge` and those of a sequence from `start` to `stop` have in common."""
        limit = min(len(edge), stop - start)
        for index in range(limit):
            if edge[index] != self._page_key(token_ids, start + index):
                return index
        return limit

    def _split(self, edge: TreeEdge, length: int) -> TreeEdge:
        """Cut `edge` after `length` pages; returns the new upper part."""
        self._common.clear()
        upper = TreeEdge(edge.parent, edge.keys[:length], edge.pages[:length], edge.last_access)
        upper.lock_ref, upper.num_hits = edge.lock_ref, edge.num_hits
        self._num_shared_edges += upper.lock_ref > 1
        edge.parent.children[upper.keys[0]] = upper
        edge.keys, edge.pages, edge.parent = edge.keys[length:], edge.pages[length:], upper
        upper.children[edge.keys[0]] = edge
        return upper

    def _edges(self) -> list[TreeEdge]:
        return _edges_below([*self._roots.values(), *self._old_roots])


def _path_to(node: TreeNode) -> list[TreeEdge]:
    """The edges from the root to a place."""
    path: list[TreeEdge] = []
    while isinstance(node, TreeEdge):
        path.append(node)
        node = node.parent
    return path[::-1]


def _edges_below(nodes: Iterable[TreeNode]) -> list[TreeEdge]:
    edges = [edge for node in nodes for edge in node.children.values()]
    for edge in edges:  # the list grows while it is walked
        edges.extend(edge.children.values())
    return edges


def _is_evictable_leaf(edge: TreeEdge) -> bool:
    return not edge.children and edge.lock_ref == 0
