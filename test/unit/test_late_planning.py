"""When a pass is planned: late in the one under way, and never so late that the device has nothing to do."""

import pytest
from ramet.srt.managers.late_planning import MAX_MARGIN, MIN_LEAD_S, MIN_SAMPLES, LatePlanning

MIXED, DECODING = (1700, 1690), (16, 0)
PASS_S, DECODING_S, HOST_S = 0.04, 0.0055, 0.001


def run(late, num_passes, kind=MIXED, seconds=PASS_S, host_s=HOST_S, waited_s=0.01):
    """Passes one after the other, each launched while the one before it was under way."""
    for _ in range(num_passes):
        late.launched(*kind, host_s, is_first=False)
        late.came_back(*kind, seconds, waited_s)


@pytest.fixture()
def late():
    """One that knows both kinds."""
    late = LatePlanning()
    for kind, seconds in ((MIXED, PASS_S), (DECODING, DECODING_S)):
        run(late, 10, kind, seconds)
    return late


def test_it_waits_until_shortly_before_the_end(late):
    assert late.spare_s(*MIXED, 0.0) == pytest.approx(PASS_S - MIN_LEAD_S)
    assert late.spare_s(*MIXED, 0.03) == pytest.approx(PASS_S - MIN_LEAD_S - 0.03)
    assert late.spare_s(*DECODING, 0.0) == pytest.approx(DECODING_S - MIN_LEAD_S)
    for elapsed_s in (PASS_S - MIN_LEAD_S, PASS_S, 10.0):
        assert late.spare_s(*MIXED, elapsed_s) == 0.0


def test_nothing_waits_for_what_is_not_known():
    late = LatePlanning()
    late.launched(*MIXED, HOST_S, is_first=True)
    assert late.spare_s(*MIXED, 0.0) == 0.0
    run(late, MIN_SAMPLES)
    assert late.spare_s(*MIXED, 0.0) > 0.0
    assert late.spare_s(300, 290, 0.0) == late.spare_s(*DECODING, 0.0) == 0.0


def test_a_pass_of_about_the_same_size_is_of_the_same_kind(late):
    assert late.spare_s(MIXED[0] + 20, MIXED[1], 0.0) == late.spare_s(*MIXED, 0.0)
    assert late.spare_s(MIXED[0], 0, 0.0) == 0.0, "without prompts it takes another time"


@pytest.mark.parametrize("host_s", [0.004, 0.03])
def test_the_lead_covers_what_the_host_takes(late, host_s):
    run(late, 30, host_s=host_s)
    spare_s = late.spare_s(*MIXED, 0.0)
    assert spare_s == (pytest.approx(PASS_S - host_s, rel=0.01) if host_s < PASS_S / 2 else 0.0)


def test_where_the_lead_is_most_of_a_pass_nothing_waits(late):
    run(late, 30, host_s=0.003)
    assert late.spare_s(*DECODING, 0.0) == 0.0 < late.spare_s(*MIXED, 0.0)


def test_times_that_scatter_make_it_earlier(late):
    before = late.spare_s(*MIXED, 0.0)
    for number in range(40):
        run(late, 1, seconds=PASS_S * (1.1 if number % 2 else 0.9))
    assert 0.0 < late.spare_s(*MIXED, 0.0) < before - 0.1 * PASS_S


@pytest.mark.parametrize("outlier_s", [0.001, 3.0])
def test_an_outlier_makes_nobody_late(late, outlier_s):
    before = late.spare_s(*MIXED, 0.0)
    run(late, 1, seconds=outlier_s)
    assert late.spare_s(*MIXED, 0.0) <= before
    run(late, 40)
    assert late.spare_s(*MIXED, 0.0) == pytest.approx(before, rel=0.05)


def test_after_a_pass_that_ended_too_soon_the_lead_is_longer(late):
    before = late.spare_s(*MIXED, 0.0)
    run(late, 1, waited_s=0.0)
    assert late.spare_s(*MIXED, 0.0) == 0.0, "nobody knows when this pass has begun"
    run(late, 1)  # in whose time nothing is learnt, but whose end is seen
    assert late.spare_s(*MIXED, 0.0) == pytest.approx(before - MIN_LEAD_S)


def test_the_time_of_a_pass_that_ended_too_soon_is_not_learnt(late):
    run(late, 20, seconds=2 * PASS_S, waited_s=0.0)
    run(late, 1)
    assert late.spare_s(*MIXED, 0.0) < PASS_S


def test_the_lead_grows_quickly_to_a_limit_and_shrinks_slowly(late):
    before = late.spare_s(*MIXED, 0.0)
    for _ in range(10):
        late.spare_s(*MIXED, 0.0)
        run(late, 1, waited_s=0.0)
        run(late, 1)
    longest = PASS_S - late.spare_s(*MIXED, 0.0)
    assert MAX_MARGIN * MIN_LEAD_S / 2 < longest <= MAX_MARGIN * MIN_LEAD_S * 1.01
    for _ in range(20):
        late.spare_s(*MIXED, 0.0)
        run(late, 1)
    assert PASS_S - longest < late.spare_s(*MIXED, 0.0) < before
    for _ in range(200):
        late.spare_s(*MIXED, 0.0)
        run(late, 1)
    assert late.spare_s(*MIXED, 0.0) == pytest.approx(before)


def test_a_host_that_is_late_by_itself_is_not_its_fault(late):
    """The passes are shorter than what the host takes for them: nothing has waited."""
    run(late, 20, waited_s=0.0)
    run(late, 1)
    assert late.spare_s(*MIXED, 0.0) == pytest.approx(PASS_S - MIN_LEAD_S)


def test_a_pass_that_begins_at_once_has_a_known_begin(late):
    run(late, 1, waited_s=0.0)
    assert late.spare_s(*MIXED, 0.0) == 0.0
    late.launched(*MIXED, None, is_first=True)
    assert late.spare_s(*MIXED, 0.0) > 0.0
