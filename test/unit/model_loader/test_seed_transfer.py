"""What a transfer asks of which seed, what it asks again, and what it drops, with seeds that die, lie or stall."""

from collections.abc import Sequence

import pytest
import seed_process
from fake_seeds import FakeOpener, FakeSeed, toy_arena, toy_tensors
from ramet.srt.model_loader.arena.base import WeightArena
from ramet.srt.model_loader.client import transfer
from ramet.srt.model_loader.client.transfer import SeedTransfer
from ramet.srt.weights.errors import WeightTransferError

GRAIN = 1 << 10
Ranges = list[tuple[int, int]]


@pytest.fixture(autouse=True)
def small_grain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "SHARED_BYTES", GRAIN)


class Case:
    """A transfer from some seeds, and how each of its rounds ended."""

    def __init__(self, *seeds: FakeSeed, is_safe: bool = True) -> None:
        self.arena = toy_arena()
        self.ends: list[str] = []
        instances = [seed.instance(self.arena.manifest) for seed in seeds]
        self.transfer = SeedTransfer(
            self.arena, instances, lambda: FakeOpener(seeds, self.arena, self.ends, is_safe=is_safe)
        )

    @property
    def alive(self) -> list[str]:
        return [seed.name for seed in self.transfer.alive]

    def holds(self, fill: int = 1) -> bool:
        return seed_process.holds(self.arena, toy_tensors(fill))


def nbytes(ranges: Ranges) -> int:
    return sum(stop - start for start, stop in ranges)


def whole(arena: WeightArena) -> int:
    """The bytes of a plan that fills all of an arena."""
    return max(entry.offset + entry.nbytes for entry in arena.manifest.entries)


def joined(parts: Sequence[Ranges]) -> Ranges:
    """Ranges that are disjoint, with neighbours in one."""
    merged: Ranges = []
    for start, stop in sorted(one for part in parts for one in part):
        assert not merged or merged[-1][1] <= start, "two seeds were asked for the same bytes"
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return merged


def test_equal_seeds_share_the_work_and_are_asked_once() -> None:
    held = toy_arena(fill=1)
    seeds = [FakeSeed(port, held) for port in (1, 2, 3)]
    case = Case(*seeds)
    case.transfer.run()
    assert case.holds() and case.ends == ["closed"]
    assert [len(seed.asked) for seed in seeds] == [1, 1, 1]
    assert joined([seed.asked_for(0) for seed in seeds]) == [(0, whole(case.arena))]
    shares = [nbytes(seed.asked_for(0)) for seed in seeds]
    assert max(shares) - min(shares) <= GRAIN
    assert case.transfer.given_nbytes({}) == {seed.name: share for seed, share in zip(seeds, shares, strict=True)}
    assert case.transfer.planned_nbytes == case.transfer.received_nbytes == whole(case.arena)
    assert case.transfer.unfinished == [] and case.transfer.source_names == ["fake"]


def test_a_seed_on_this_host_gives_everything() -> None:
    held = toy_arena(fill=1)
    near, far = FakeSeed(1, held, is_local=True), FakeSeed(2, held)
    case = Case(far, near)
    case.transfer.run()
    assert case.holds() and far.asked == [] and nbytes(near.asked_for(0)) == whole(case.arena)


def test_what_a_seed_that_dies_has_not_sent_is_asked_of_the_others(caplog: pytest.LogCaptureFixture) -> None:
    held = toy_arena(fill=1)
    dying = FakeSeed(1, held, error=ConnectionResetError("it has gone"), num_good=3)
    living = FakeSeed(2, held)
    case = Case(dying, living)
    case.transfer.run()
    assert case.holds() and case.alive == [living.name] and case.ends == ["abandoned", "closed"]
    sent = dying.asked_for(0)[:3]
    assert living.asked_for(1) == dying.asked_for(0)[3:]
    assert case.transfer.given_nbytes({}) == {
        dying.name: nbytes(sent),
        living.name: whole(case.arena) - nbytes(sent),
    }
    (error,) = case.transfer.errors
    assert error.seed == dying.name and "it has gone" in str(error)
    assert f"the seed {dying.name} failed, its share goes to {living.name}" in caplog.text


def test_a_seed_whose_transport_does_not_start_gives_nothing() -> None:
    held = toy_arena(fill=1)
    closed, living = FakeSeed(1, held, can_be_opened=False), FakeSeed(2, held)
    case = Case(closed, living)
    case.transfer.run()
    assert case.holds() and closed.asked == [] and case.transfer.given_nbytes({}) == {living.name: whole(case.arena)}


@pytest.mark.parametrize("is_safe", [True, False])
def test_after_a_stall_that_may_still_write_everything_is_asked_again(is_safe: bool) -> None:
    """A network card that was given up may write to pages that it has been given: they must not be the arena's."""
    held = toy_arena(fill=1)
    stall = WeightTransferError("transfer", 0, "10.0.0.1:1", "no progress for 60 s")
    stalling, living = FakeSeed(1, held, error=stall, num_good=1), FakeSeed(2, held)
    case = Case(stalling, living, is_safe=is_safe)
    case.transfer.run()
    assert case.holds() and case.alive == [living.name]
    again = nbytes(living.asked_for(1))
    if is_safe:
        assert again == nbytes(stalling.asked_for(0)[1:])
        assert stalling.name in case.transfer.given_nbytes({})
    else:
        assert again == whole(case.arena)
        assert case.transfer.given_nbytes({}) == {living.name: whole(case.arena)}


def test_when_all_have_died_what_they_sent_is_known() -> None:
    held = toy_arena(fill=1)
    seeds = [FakeSeed(port, held, error=OSError(f"end of {port}"), num_good=2) for port in (1, 2)]
    case = Case(*seeds)
    with pytest.raises(WeightTransferError, match="end of 1.*end of 2"):
        case.transfer.run()
    unfinished = case.transfer.unfinished
    assert unfinished is not None and case.alive == [] and case.ends == ["abandoned"]
    rest = [(op.target_offset, op.target_stop) for op in unfinished]
    sent = [seed.asked_for(0)[:2] for seed in seeds]
    assert joined([rest, *sent]) == [(0, whole(case.arena))]
    assert case.transfer.received_nbytes == sum(nbytes(ranges) for ranges in sent) > 0


def test_all_that_a_liar_has_sent_is_asked_again_of_the_others() -> None:
    """Not only what was found: who sends one tensor wrong is not believed in the others."""
    held = toy_arena(fill=1)
    wrong_entry = held.manifest.entries[0]
    liar, honest = FakeSeed(1, held, lies_at=wrong_entry.offset), FakeSeed(2, held)
    case = Case(liar, honest)
    case.transfer.run()
    assert not case.holds()
    error = WeightTransferError("verify", 0, liar.name, "w0 differs")
    case.transfer.blame([(wrong_entry.offset, wrong_entry.offset + wrong_entry.nbytes)], error)
    assert case.alive == [honest.name] and case.transfer.errors == [error]
    case.transfer.run()
    assert case.holds() and honest.asked_for(1) == liar.asked_for(0)
    assert case.transfer.given_nbytes({}) == {honest.name: whole(case.arena)}


def test_when_only_a_liar_is_left_its_error_ends_the_transfer() -> None:
    liar = FakeSeed(1, toy_arena(fill=1), lies_at=0)
    case = Case(liar)
    case.transfer.run()
    error = WeightTransferError("verify", 0, liar.name, "w0 differs")
    case.transfer.blame([(0, 1)], error)
    with pytest.raises(WeightTransferError) as raised:
        case.transfer.run()
    assert raised.value is error and case.transfer.received_nbytes == 0


def test_an_error_that_is_not_a_seed_s_is_not_held_against_it() -> None:
    case = Case(FakeSeed(1, toy_arena(fill=1), error=MemoryError("no memory")))
    with pytest.raises(MemoryError):
        case.transfer.run()
    assert case.ends == ["abandoned"] and case.alive


def test_givers_go_by_their_worker_ids_where_they_have_one() -> None:
    case = Case(FakeSeed(1, toy_arena(fill=1)))
    case.transfer.run()
    assert case.transfer.given_nbytes({0: "worker"}) == {"worker": whole(case.arena)}
