"""Which adapter is in which slot: who gives way, who waits, and what the ranks are told."""

import pytest
from ramet.srt.batch.batch_plan import LoraPlacement
from ramet.srt.managers.lora_slots import NO_SLOT, LoraRoom, LoraSlots


def told(slots):
    return [(placement.slot, placement.lora_id) for placement in slots.take_placements()]


def test_requests_without_an_adapter_need_no_slot():
    slots = LoraSlots(0)
    assert slots.has_room(0) and slots.take(0) == NO_SLOT
    slots.give_back(0)
    assert not slots.has_room(1) and slots.take_placements() == []


def test_the_one_that_has_not_run_for_longest_gives_way():
    slots = LoraSlots(2)
    assert [slots.take(1), slots.take(2), slots.take(1)] == [0, 1, 0]
    assert told(slots) == [(0, 1), (1, 2)] and told(slots) == []
    assert not slots.has_room(3) and slots.has_room(2)
    slots.give_back(1)
    assert not slots.has_room(3)  # another request runs with it
    slots.give_back(1)
    slots.give_back(2)
    assert slots.take(1) == 0  # now 2 has not run for longer
    slots.give_back(1)
    assert slots.take(3) == 1 and told(slots) == [(1, 3)]
    assert slots.take(2) == 0 and slots.take_placements() == [LoraPlacement(0, 2)]


def test_pinned_ones_stay():
    slots = LoraSlots(2)
    slots.pin(1)
    for lora_id in (1, 2):
        slots.take(lora_id)
        slots.give_back(lora_id)
    assert slots.num_pinned == 1
    assert slots.take(3) == 1 and not slots.has_room(2)


def test_a_dropped_one_leaves_its_slot():
    slots = LoraSlots(1)
    slots.take(1)
    with pytest.raises(AssertionError, match="a request runs with"):
        slots.forget(1)
    slots = LoraSlots(1)
    slots.pin(1)
    slots.take(1)
    slots.give_back(1)
    slots.forget(1)
    assert slots.num_pinned == 0 and told(slots) == []  # the ranks have never been told, and need not be
    assert slots.take(2) == 0 and told(slots) == [(0, 2)]


def test_who_finds_no_slot_lets_nobody_pass_who_would_keep_one():
    slots = LoraSlots(1)
    slots.take(1)
    room = LoraRoom(slots)
    assert room.has_room(1) and not room.has_room(2) and not room.has_room(1) and room.has_room(0)
    assert LoraRoom(slots).has_room(1)  # in the next pass the order may be another
