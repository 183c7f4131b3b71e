"""Ages by a clock that does not jump, whatever the wall clocks say."""

from ramet.srt.modelexpress.server.row_ages import RowAges
from ramet.srt.modelexpress.server.store import Row


class Clocks:
    def __init__(self) -> None:
        self.wall_ms = 1_000_000_000
        self.monotonic_s = 50.0

    def tracker(self, trusted: bool = True) -> RowAges:
        return RowAges((lambda: self.wall_ms) if trusted else None, lambda: self.monotonic_s)


def row(worker_id: str, updated_at: int) -> Row:
    return Row(source_id="s", worker_id=worker_id, worker_rank=0, status=2, updated_at=updated_at)


def test_a_record_that_comes_old_is_old() -> None:
    clocks = Clocks()
    ages = clocks.tracker()
    assert ages.row_age_s(row("a", clocks.wall_ms - 120_000)) == 120
    clocks.monotonic_s += 5
    assert ages.row_age_s(row("a", clocks.wall_ms - 120_000)) == 125


def test_a_jump_of_the_wall_clock_ages_nobody() -> None:
    clocks = Clocks()
    ages = clocks.tracker()
    known = row("a", clocks.wall_ms)
    assert ages.row_age_s(known) == 0
    clocks.wall_ms += 86_400_000
    clocks.monotonic_s += 1
    assert ages.row_age_s(known) == 1
    clocks.wall_ms -= 2 * 86_400_000
    assert ages.row_age_s(known) == 1


def test_a_stamp_from_the_future_ages_from_now_on() -> None:
    clocks = Clocks()
    ages = clocks.tracker()
    future = row("a", clocks.wall_ms + 3_600_000)
    assert ages.row_age_s(future) == 0
    clocks.monotonic_s += 91
    assert ages.row_age_s(future) == 91


def test_a_heartbeat_makes_it_young_and_what_has_gone_is_forgotten() -> None:
    clocks = Clocks()
    ages = clocks.tracker()
    ages.row_age_s(row("a", clocks.wall_ms))
    clocks.monotonic_s += 60
    clocks.wall_ms += 60_000
    assert ages.row_age_s(row("a", clocks.wall_ms)) == 0
    ages.keep_only([])
    assert ages.row_age_s(row("a", clocks.wall_ms - 60_000)) == 60


def test_a_client_takes_what_it_first_sees_for_new() -> None:
    clocks = Clocks()
    ages = clocks.tracker(trusted=False)
    assert ages.row_age_s(row("a", 1)) == 0
    clocks.monotonic_s += 11
    assert ages.row_age_s(row("a", 1)) == 11
    assert ages.row_age_s(row("a", 2)) == 0
