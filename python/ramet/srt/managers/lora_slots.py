"""Owns which adapter is in which of the ranks' slots, as their leader plans it for them."""

from collections import Counter

from ramet.srt.batch.batch_plan import LoraPlacement
from ramet.srt.lora.adapter import NO_ADAPTER

NO_SLOT = -1


class LoraSlots:
    """Adapters share the slots by turns: the one that has not run for longest gives way, if no request has it now."""

    def __init__(self, num_slots: int):
        self._free = list(range(num_slots))
        self._slots: dict[int, int] = {}  # adapter -> its slot; the one that has not run for longest comes first
        self._num_users: Counter[int] = Counter()  # requests that run with an adapter
        self._pinned: set[int] = set()
        self._placements: list[LoraPlacement] = []  # that the ranks are yet to be told of
        self.num_slots = num_slots

    @property
    def num_pinned(self) -> int:
        return len(self._pinned)

    def pin(self, lora_id: int) -> None:
        """Let an adapter keep its slot, once it has one, until it is forgotten."""
        self._pinned.add(lora_id)

    def has_room(self, lora_id: int) -> bool:
        """Whether a request with this adapter can run now."""
        return lora_id == NO_ADAPTER or lora_id in self._slots or bool(self._free) or self._idle() is not None

    def take(self, lora_id: int) -> int:
        """The slot of an adapter with which one more request begins to run; there is room."""
        if lora_id == NO_ADAPTER:
            return NO_SLOT
        self._num_users[lora_id] += 1
        slot = self._slots.pop(lora_id, None)
        if slot is None:
            slot = self._make_room()
            self._placements.append(LoraPlacement(slot, lora_id))
        self._slots[lora_id] = slot
        return slot

    def give_back(self, lora_id: int) -> None:
        """A request with this adapter stops running."""
        if lora_id != NO_ADAPTER:
            self._num_users[lora_id] -= 1
            assert self._num_users[lora_id] >= 0, "an adapter's slot was given back more often than taken"

    def forget(self, lora_id: int) -> None:
        """The adapter is dropped; nothing runs with it."""
        assert not self._num_users.pop(lora_id, 0), "an adapter is dropped that a request runs with"
        self._pinned.discard(lora_id)
        if lora_id in self._slots:
            self._free.append(self._slots.pop(lora_id))
        self._placements = [placement for placement in self._placements if placement.lora_id != lora_id]

    def take_placements(self) -> list[LoraPlacement]:
        """What has changed since the last call, for the next plan."""
        placements, self._placements = self._placements, []
        return placements

    def _make_room(self) -> int:
        if self._free:
            return self._free.pop(0)
        idle = self._idle()
        assert idle is not None, "an adapter begins to run, but all slots are in use"
        return self._slots.pop(idle)

    def _idle(self) -> int | None:
        """The adapter that gives way next."""
        return next((one for one in self._slots if not self._num_users[one] and one not in self._pinned), None)


class LoraRoom:
    """What is left of the slots while a pass is filled.

    Who finds none free closes them for those behind it: with other adapters they would keep it waiting.
    """

    def __init__(self, slots: LoraSlots):
        self._slots = slots
        self._is_closed = False

    def has_room(self, lora_id: int) -> bool:
        """Whether a request with this adapter may begin to run."""
        if lora_id == NO_ADAPTER:
            return True
        self._is_closed = self._is_closed or not self._slots.has_room(lora_id)
        return not self._is_closed

    def take(self, lora_id: int) -> int:
        """It does; the slot of its tokens."""
        return self._slots.take(lora_id)
