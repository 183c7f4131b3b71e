"""Owns which prefixes have a state: linear layers keep one for all tokens, so that pages alone are no prefix for them.

States are kept at page borders: where a chunk of a prompt ends, and in the end at the last border that a repetition of
the prompt can use; where a prompt leaves a prefix that others have computed; and of a request that decodes, at the last
of some borders, for whoever goes on from its output. They are snapshots, which give way to requests and newer ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ramet.srt.mem_cache.radix_cache import RadixCache, TreeEdge, TreeNode
from ramet.srt.mem_cache.state_slots import StateSlots

DECODE_STRIDE = 64  # tokens between the borders of a request that decodes, at least


@dataclass(slots=True, eq=False)
class RequestState:
    """One running request's state, and what is kept of it. It is the owner of a snapshot that is in no tree yet."""

    slot: int
    branch_len: int  # tokens of its prompt that others have computed, but of which no state was kept
    saved: list[tuple[int, int]] = field(default_factory=list)  # by the pass in question: tokens, slot
    passing: TreeNode | None = None  # where the newest chunk's snapshot is, which the next chunk's replaces
    loose_len: int = 0  # tokens of its own snapshot


@dataclass(slots=True)
class StateSteps:
    """What the ranks have not been told yet; see StateMoves."""

    rows: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    kept_sources: list[int] = field(default_factory=list)
    kept_targets: list[int] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        return not (self.rows or self.kept_sources)


class PrefixStates:
    """The states of one attention group's requests and prefixes.

    Args:
        tree: whose edges end where there may be a state.
    """

    def __init__(self, num_slots: int, tree: RadixCache, page_size: int):
        self.slots = StateSlots(num_slots)
        self._tree = tree
        self._page_size = page_size
        self._stride = -(-DECODE_STRIDE // page_size) * page_size
        self._steps = StateSteps()
        self.num_hits = 0  # requests that have begun with the state of a prefix
        tree.on_evict = self.slots.displace

    def deepest(self, pages: list[int], node: TreeNode) -> tuple[list[int], TreeNode]:
        """Of a prefix that ends at `node`, what has a state."""
        num_pages = len(pages)
        while isinstance(node, TreeEdge) and not self.slots.has(node):
            num_pages -= len(node.pages)
            node = node.parent
        return pages[:num_pages], node

    def begin(self, row: int, node: TreeNode, branch_len: int) -> RequestState:
        """Give a request a slot, and in it the state of the prefix that ends at `node`. There is one available."""
        source = self.slots.use(node) if isinstance(node, TreeEdge) else None
        self.num_hits += source is not None
        slot = self.slots.take()  # where nothing else is left, the snapshot itself
        self._steps.rows.append(row)
        self._steps.slots.append(slot)
        if source is not None and source != slot:
            self._steps.sources.append(source)
            self._steps.targets.append(slot)
        return RequestState(slot, branch_len)

    def plan(self, state: RequestState, start: int, stop: int, num_tokens: int | None) -> list[tuple[int, int]]:
        """Which states the next pass keeps of a request: (new tokens, slot), of those that are not at its end.

        Args:
            start, stop: tokens before the pass and after it.
            num_tokens: of the prompt that it computes a chunk of; None for a request that decodes.
        """
        if num_tokens is None:
            borders = {stop} if stop % self._stride == 0 else set()
        else:
            last = min(stop, num_tokens - 1) // self._page_size * self._page_size
            borders = {border for border in (state.branch_len, last) if start < border <= stop}
        inside = []
        for border in sorted(borders):
            if self.slots.num_available == 0:
                break
            slot = self.slots.take()
            state.saved.append((border, slot))
            if border < stop:
                inside.append((border - start, slot))
            else:
                self._steps.kept_sources.append(state.slot)
                self._steps.kept_targets.append(slot)
        return inside

    def note_launched(self, state: RequestState, tree_ids: Sequence[int], num_in_tree: int, lora_id: int) -> None:
        """A pass is queued that keeps the planned states: others may take them from here on.

        Args:
            num_in_tree: tokens of the request whose pages are in the tree.
        """
        for num_tokens, slot in state.saved:
            if num_tokens > num_in_tree:
                self.slots.keep(state, slot)
                state.loose_len = num_tokens
                continue
            node = self._end_of(tree_ids, num_tokens, lora_id)
            is_own = not self.slots.has(node)
            if is_own:
                self.slots.keep(node, slot)
            else:
                self.slots.give_back(slot)
                self.slots.use(node)
            if state.passing is not None and state.passing is not node:
                self.slots.drop(state.passing)
            is_passing = num_tokens != state.branch_len and num_tokens + self._page_size < len(tree_ids)
            state.passing = node if is_own and is_passing else None
        state.saved.clear()

    def _end_of(self, tree_ids: Sequence[int], num_tokens: int, lora_id: int) -> TreeNode:
        pages, node = self._tree.match_prefix(tree_ids, num_tokens, lora_id)
        assert len(pages) * self._page_size == num_tokens, "a request's shared pages are in the tree while it runs"
        return node

    def release(self, state: RequestState, tree_ids: Sequence[int], num_in_tree: int, lora_id: int) -> None:
        """A request stops running: what it has kept is the tree's where that has its pages."""
        if self.slots.has(state):
            if 0 < state.loose_len <= num_in_tree:
                self.slots.hand_over(state, self._end_of(tree_ids, state.loose_len, lora_id))
            else:
                self.slots.drop(state)
        self.slots.give_back(state.slot)

    def take_steps(self) -> StateSteps:
        """The steps since the last call."""
        steps, self._steps = self._steps, StateSteps()
        return steps
