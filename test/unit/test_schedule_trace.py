"""First tokens and token times of a trace on a simulated clock, by the scheduler's rules and by those before them."""

from collections.abc import Sequence

import pytest
from simulated_passes import Alternating, Arrival, PassTimes, Simulation, Timeline, poisson

SHORT, LONG = 512, 8192
MIXED = poisson(16.0, SHORT, 128, 20.0, seed=1) + poisson(1.0, LONG, 128, 20.0, seed=2)


def percentile(values: Sequence[float], percent: float) -> float:
    return sorted(values)[int((len(values) - 1) * percent / 100)]


def figures(timelines: Sequence[Timeline]) -> dict[str, float]:
    """In milliseconds."""
    gaps = [gap for timeline in timelines for gap in timeline.gaps_s]
    found = {"ITL p50": percentile(gaps, 50), "ITL p99": percentile(gaps, 99), "ITL max": max(gaps)}
    for name, length in (("short", SHORT), ("long", LONG)):
        first = [timeline.ttft_s for timeline in timelines if timeline.arrival.num_in == length]
        found |= {f"{name} TTFT p50": percentile(first, 50), f"{name} TTFT p99": percentile(first, 99)}
    found["e2e p50"] = percentile([timeline.e2e_s for timeline in timelines], 50)
    return {name: 1000 * seconds for name, seconds in found.items()}


@pytest.fixture(scope="module")
def before() -> dict[str, float]:
    return figures(Alternating(PassTimes(), 8192).run(MIXED))


@pytest.fixture(scope="module", params=["deadline", "lpm", "fcfs"])
def after(request: pytest.FixtureRequest, before: dict[str, float]) -> dict[str, float]:
    found = figures(Simulation(schedule_policy=request.param).run(MIXED))
    print(f"\n{'ms':16}{'alternating':>12}{request.param:>12}")
    for name, value in found.items():
        print(f"{name:16}{before[name]:12.1f}{value:12.1f}")
    return found


def test_the_token_time_keeps_to_the_target_while_long_prompts_are_computed(before, after) -> None:
    assert before["ITL max"] > 150
    assert after["ITL p99"] <= 42 and after["ITL max"] <= 60
    assert after["ITL p50"] <= before["ITL p50"]


def test_first_tokens_come_as_soon_as_before_and_the_worst_sooner(before, after) -> None:
    assert after["short TTFT p50"] <= 35
    assert after["short TTFT p99"] < before["short TTFT p99"]
    assert after["long TTFT p50"] <= 1.25 * before["long TTFT p50"]
    assert after["long TTFT p99"] <= 1.25 * before["long TTFT p99"]


def test_requests_end_sooner(before, after) -> None:
    assert after["e2e p50"] <= min(1200, before["e2e p50"])


def test_short_prompts_do_not_starve_a_long_one() -> None:
    """They alone would keep the ranks at work for ever; every prompt would be tried before the long one by length."""
    shorts = [Arrival(0.01 * number, SHORT, 1) for number in range(400)]  # 10 ms of work each 10 ms
    (long,) = (one for one in Simulation().run([*shorts, Arrival(0.5, LONG, 1)]) if one.arrival.num_in == LONG)
    alone = Simulation().run([Arrival(0.0, LONG, 1)])[0].ttft_s
    assert long.ttft_s < 6 * alone


def test_long_prompts_do_not_starve_a_short_one() -> None:
    """It waits for the pass under way and the one that is planned ahead, and is in the next."""
    times = PassTimes()
    longs = [Arrival(0.0, 32_000, 64) for _ in range(4)]
    timelines = Simulation(times).run([*longs, *(Arrival(0.5 + 0.1 * number, 128, 1) for number in range(10))])
    assert max(one.ttft_s for one in timelines if one.arrival.num_in == 128) < 3 * times.seconds(8192, 32_000)
    assert max(one.ttft_s for one in timelines) < 3.5


def test_a_request_that_needs_much_room_is_not_overtaken_for_ever() -> None:
    """There is room for some small ones or for the large one; small ones come all the time."""
    smalls = [Arrival(0.02 * number, SHORT, 64) for number in range(150)]
    simulation = Simulation(num_tokens=9000)
    (large,) = (one for one in simulation.run([*smalls, Arrival(1.0, 6000, 8)]) if one.arrival.num_in == 6000)
    assert large.ttft_s < 1.5


def test_a_full_cache_lets_everyone_end_and_nobody_start_over_again_and_again() -> None:
    arrivals = [Arrival(0.001 * number, 300, 400) for number in range(60)]
    simulation = Simulation(num_tokens=20_000)
    timelines = simulation.run(arrivals)
    assert all(len(timeline.token_times) == 400 for timeline in timelines)
    assert 0 < simulation.scheduler.num_retracted < 60


def test_prompts_that_share_a_prefix_compute_it_once() -> None:
    arrivals = [Arrival(0.0, 4000, 1, prefix=1) for _ in range(8)]
    shared = max(one.ttft_s for one in Simulation().run(arrivals))
    alone = max(one.ttft_s for one in Simulation().run([Arrival(0.0, 4000, 1) for _ in range(8)]))
    assert shared < 0.6 * alone
