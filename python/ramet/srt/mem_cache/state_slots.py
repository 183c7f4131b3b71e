"""Owns which slots of a state pool are whose: of running requests, or of snapshots that stand for a prefix.

A snapshot is what the linear layers keep once some tokens are computed: with it, and the pages of the prefix, another
request can go on from there. Slots that no request needs hold snapshots; the one unused longest gives way.
"""

from collections.abc import Hashable, Sequence


class StateSlots:
    """Slots 1 to num_slots of one attention group."""

    def __init__(self, num_slots: int):
        self.num_slots = num_slots
        self.num_evictions = 0  # snapshots that are gone, for whatever reason
        self.num_displaced = 0  # of those, the ones that gave way to a request or another snapshot, or to pages
        self._free = list(range(num_slots, 0, -1))
        self._snapshots: dict[Hashable, int] = {}  # slot of each owner, the longest unused first

    @property
    def num_available(self) -> int:
        """Slots that are free or hold a snapshot, which can give way."""
        return len(self._free) + len(self._snapshots)

    @property
    def num_snapshots(self) -> int:
        return len(self._snapshots)

    @property
    def num_used(self) -> int:
        """Slots of running requests, and of snapshots that a pass under way makes for them."""
        return self.num_slots - self.num_available

    def take(self) -> int:
        """A slot, of which nothing is known. The caller has checked that one is available."""
        if self._free:
            return self._free.pop()
        self.num_evictions += 1
        self.num_displaced += 1
        return self._snapshots.pop(next(iter(self._snapshots)))

    def give_back(self, slot: int) -> None:
        self._free.append(slot)

    def keep(self, owner: Hashable, slot: int) -> None:
        """What is in a taken slot is the owner's snapshot from now on, in place of one that it has."""
        self.drop(owner)
        self._snapshots[owner] = slot

    def has(self, owner: Hashable) -> bool:
        return owner in self._snapshots

    def use(self, owner: Hashable) -> int:
        """The slot of an owner's snapshot, which counts as used now."""
        slot = self._snapshots.pop(owner)
        self._snapshots[owner] = slot
        return slot

    def hand_over(self, owner: Hashable, other: Hashable) -> None:
        """A snapshot is another owner's from now on, unless that one has its own."""
        if other in self._snapshots:
            self.drop(owner)
            self.use(other)
        else:
            self._snapshots[other] = self._snapshots.pop(owner)

    def drop(self, owner: Hashable) -> None:
        """Forget an owner's snapshot, if it has one."""
        slot = self._snapshots.pop(owner, None)
        if slot is not None:
            self.num_evictions += 1
            self._free.append(slot)

    def displace(self, owner: Hashable) -> None:
        """The pages of an owner's prefix are needed: its snapshot, if it has one, goes with them."""
        self.num_displaced += self.has(owner)
        self.drop(owner)

    def drop_all(self) -> None:
        """Forget every snapshot."""
        for owner in list(self._snapshots):
            self.drop(owner)

    def check(self, in_use: Sequence[int]) -> None:
        """Assert that each slot is in one place: free, a snapshot's, or with one of the requests that have `in_use`."""
        everywhere = [*self._free, *self._snapshots.values(), *in_use]
        assert sorted(everywhere) == list(range(1, self.num_slots + 1)), "a state's slot is lost or has two owners"
