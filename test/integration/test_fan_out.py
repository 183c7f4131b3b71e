"""Clones that start together: they give each other what they have, and go around those that end or lie."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
from fan_out_clones import CloneProcess
from seed_process import SeedProcess

NUM_MIB = 16
MODEL: dict[str, Any] = {"shapes": {f"t{i}": [1 << 17] for i in range(2 * NUM_MIB)}}  # half a MiB each
NBYTES = NUM_MIB << 20
SLOW = 3 << 20  # bytes per second and connection: a clone alone takes three seconds


@contextlib.contextmanager
def clones(count: int, seed: SeedProcess, **config: Any) -> Iterator[list[CloneProcess]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(CloneProcess(MODEL, [("127.0.0.1", seed.port)], **config)) for _ in range(count)]


@pytest.fixture
def seed() -> Iterator[SeedProcess]:
    with SeedProcess(**MODEL) as process:
        yield process


def assert_right(done: dict[str, Any]) -> None:
    assert done["what"] == "done", done
    assert done["is_right"] and done["is_verified"] and sum(done["taken"].values()) == NBYTES


def from_seed(done: list[dict[str, Any]], seed: SeedProcess) -> int:
    return sum(one["taken"].get(f"127.0.0.1:{seed.port}", 0) for one in done)


def test_the_seed_sends_about_two_copies_to_three_clones(seed: SeedProcess) -> None:
    with clones(3, seed, bytes_per_s=SLOW) as started:
        done = [clone.read("done", "failed") for clone in started]
        for one in done:
            assert_right(one)
        assert NBYTES <= from_seed(done, seed) <= 2.2 * NBYTES
        given = [clone.end()["given"] for clone in started]
        assert sum(given) == 3 * NBYTES - from_seed(done, seed), "what is counted is what was taken"


def test_a_clone_that_comes_later_takes_from_those_that_are_full(seed: SeedProcess) -> None:
    with clones(1, seed) as [first]:
        assert_right(first.read("done", "failed"))
        with clones(1, seed, bytes_per_s=SLOW) as [second]:
            done = second.read("done", "failed")
            assert_right(done)
            assert 0 < from_seed([done], seed) < NBYTES


def test_a_killed_clone_is_gone_around_within_half_a_second(seed: SeedProcess) -> None:
    with clones(3, seed, bytes_per_s=SLOW) as started:
        victim, *others = started
        for _ in range(3):
            victim.read("piece")
        for other in others:
            other.read("piece")
        killed_at = time.time()
        victim.process.kill()
        done = [other.read("done", "failed") for other in others]
        for one in done:
            assert_right(one)
        lost = [other.dropped for other in others]
        assert all(len(one) == 1 for one in lost), lost
        assert max(one["at"] for [one] in lost) - killed_at < 0.5
        for other, [dropped] in zip(others, lost, strict=True):
            after = [piece for piece in other.pieces if piece["at"] > killed_at + 0.5]
            assert after and all(piece["giver"] != dropped["giver"] for piece in after)


def test_clones_finish_while_one_of_them_is_stopped(seed: SeedProcess) -> None:
    with clones(3, seed, bytes_per_s=SLOW) as started:
        victim, *others = started
        for _ in range(3):
            victim.read("piece")
        os.kill(victim.process.pid, signal.SIGSTOP)
        try:
            for other in others:
                assert_right(other.read("done", "failed"))
        finally:
            os.kill(victim.process.pid, signal.SIGCONT)
        assert_right(victim.read("done", "failed"))


def test_pieces_that_are_wrong_are_not_taken(seed: SeedProcess) -> None:
    with clones(1, seed, bytes_per_s=SLOW, lies=True) as [liar], clones(2, seed, bytes_per_s=SLOW) as others:
        for other in others:
            assert_right(other.read("done", "failed"))
        assert any("checksums" in one["reason"] for other in others for one in other.dropped)
        assert liar.process.poll() is None


def test_when_the_only_seed_ends_too_early_the_clones_say_so(seed: SeedProcess) -> None:
    with clones(2, seed, bytes_per_s=1 << 20) as started:
        for clone in started:
            clone.read("piece")
        seed.kill()
        for clone in started:
            failed = clone.read("done", "failed")
            assert failed["what"] == "failed" and str(seed.port) in failed["reason"]
