"""A seed's looks at its own memory: what is found at once, what in its turn, and what is said then."""

import threading

import pytest
from fake_seeds import toy_arena
from ramet.srt.model_loader.checksums.entries import compute_checksums
from ramet.srt.model_loader.seed.arena_watch import ArenaWatch, make_parts


@pytest.fixture
def arena():
    return toy_arena(1, shapes={"small": [8], "long": [64, 1024], "last": [300], "empty": [0, 4]})


def watch(arena, interval_s=3600.0, on_change=print):
    return ArenaWatch(arena, compute_checksums(arena.manifest, arena), interval_s, on_change)


def offset(arena, name):
    return next(entry.offset for entry in arena.manifest.entries if entry.name == name)


def test_what_samples_show_is_found_with_the_next_look(arena):
    watching = watch(arena)
    assert watching.look() == []
    for name, place in (("small", 5), ("long", 0), ("last", 1199)):
        arena.memory[offset(arena, name) + place] ^= 1
    assert watching.look() == ["small", "long", "last"]
    watching.close()


def test_a_byte_between_the_samples_is_found_in_its_turn(arena, monkeypatch):
    monkeypatch.setattr(type(arena), "watched_nbytes", 2000)
    watching = watch(arena)
    arena.memory[offset(arena, "long") + 50_000] ^= 1
    looks = [watching.look() for _ in range(6)]
    assert sorted(looks) == [[], [], [], [], ["long"], ["long"]]
    watching.close()


def test_parts_cover_everything_once(arena):
    parts = make_parts(arena.manifest.entries, 2000)
    assert [[entry.name for entry in part] for part in parts] == [["small"], ["long"], ["last"]]
    (whole,) = make_parts(arena.manifest.entries, 1 << 30)
    assert [entry.name for entry in whole] == ["small", "long", "last"]


def test_it_says_once_what_has_changed_and_ends(arena):
    said, has_said = [], threading.Event()
    watching = watch(arena, 0.01, lambda line: (said.append(line), has_said.set()))
    arena.memory[offset(arena, "last")] ^= 1
    assert has_said.wait(10)
    watching._thread.join(10)
    assert said == ["the target weights of rank 0 have been changed in memory since they were offered: last"]
    watching.close()


def test_close_ends_it_at_once(arena):
    watching = watch(arena)
    watching.close()
    assert not watching._thread.is_alive()


def test_what_can_no_longer_be_read_is_said_too(arena, monkeypatch):
    def fail(entries):
        raise RuntimeError("the device is gone")

    said, has_said = [], threading.Event()
    watching = watch(arena, 0.01, lambda line: (said.append(line), has_said.set()))
    monkeypatch.setattr(arena, "quick_samples", fail)
    assert has_said.wait(10)
    watching.close()
    assert said == [
        "the target weights of rank 0 can't be compared with what was offered: RuntimeError('the device is gone')"
    ]
