"""The memory of responses: what it finds, what it forgets, and that it counts each byte once."""

import random
from typing import Any

from ramet.srt.entrypoints.openai.response_store import ResponseStore


def item(name: str, text: str = "a") -> dict[str, Any]:
    return {"id": name, "type": "message", "role": "user", "content": text}


def add(store: ResponseStore, name: str, *, after: str | None = None, text: str = "a", own: bool = True) -> None:
    history = () if after is None else store.get(after).items
    asked = item(f"in_{name}", text)
    store.add(
        {"id": name, "output": [item(f"out_{name}")]},
        history,
        [asked],
        frozenset([asked["id"]]) if own else frozenset(),
    )


def test_a_conversation_is_found() -> None:
    store = ResponseStore()
    add(store, "r1")
    add(store, "r2", after="r1")
    stored = store.get("r2")
    assert [one.id for one in stored.items] == ["in_r1", "out_r1", "in_r2", "out_r2"]
    assert [one.id for one in stored.input] == ["in_r1", "out_r1", "in_r2"]
    assert store.get_item("out_r1").decode() == item("out_r1")
    assert store.get("r3") is None
    assert store.get_item("nothing") is None


def test_a_response_that_is_forgotten_leaves_its_items_to_later_ones() -> None:
    store = ResponseStore()
    add(store, "r1")
    add(store, "r2", after="r1")
    assert store.delete("r1")
    assert not store.delete("r1")
    assert store.get("r1") is None
    assert store.get_item("in_r1") is not None
    assert [one.id for one in store.get("r2").items][:2] == ["in_r1", "out_r1"]
    assert store.delete("r2")
    assert store.get_item("in_r1") is None
    assert store.num_bytes == 0


def test_what_was_used_longest_ago_goes_first() -> None:
    store = ResponseStore(max_responses=2)
    add(store, "r1")
    add(store, "r2")
    store.get("r1")
    add(store, "r3")
    assert store.get("r2") is None
    store.get_item("out_r1")
    add(store, "r4")
    assert store.get("r3") is None
    assert store.get("r1") is not None
    assert len(store) == 2


def test_bytes_are_bounded() -> None:
    store = ResponseStore(max_bytes=20_000, max_response_bytes=10_000)
    for number in range(20):
        add(store, f"r{number}", text="a" * 4000)
        assert store.num_bytes <= 20_000
    assert 0 < len(store) <= 5
    add(store, "large", text="a" * 10_000)
    assert store.get("large") is None
    assert store.get("r19") is not None


def test_an_item_counts_once_however_many_have_it() -> None:
    store = ResponseStore()
    add(store, "r1", text="a" * 50_000)
    before = store.num_bytes
    add(store, "r2", after="r1")
    add(store, "r3", after="r2")
    assert store.num_bytes - before < 5000
    # A client that sends all of the conversation each time: the items are the same.
    store.add({"id": "r4", "output": []}, (), [item("in_r1", "a" * 50_000)], frozenset())
    assert store.num_bytes - before < 6000


def test_counting_goes_back_to_nothing() -> None:
    choose = random.Random(3)
    store = ResponseStore(max_responses=10)
    names: list[str] = []
    for number in range(300):
        after = choose.choice(names) if names and choose.random() < 0.7 else None
        add(store, f"r{number}", after=after if after and store.get(after) else None, own=choose.random() < 0.5)
        names = [*names[-8:], f"r{number}"]
        if choose.random() < 0.3:
            store.delete(choose.choice(names))
    for name in names:
        store.delete(name)
    for number in range(300):
        store.delete(f"r{number}")
    assert store.num_bytes == 0
    assert len(store) == 0
    assert store.get_item("out_r299") is None


def test_nobody_can_put_an_item_in_the_place_of_another() -> None:
    store = ResponseStore()
    add(store, "r1")
    store.add({"id": "r2", "output": []}, (), [item("out_r1", "false")], frozenset())
    assert store.get_item("out_r1").decode() == item("out_r1")
    store.add({"id": "r3", "output": []}, (), [item("chosen")], frozenset())
    assert store.get_item("chosen") is None
