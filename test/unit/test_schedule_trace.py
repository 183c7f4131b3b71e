"""First tokens and token times of a trace on a simulated clock, by the scheduler's rules and by those before them."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import pytest
from ramet.srt.managers.scheduler import MAX_WAIT_S
from simulated_passes import ROUND_TIMES, Alternating, Arrival, PassTimes, Simulation, Timeline, poisson

SHORT, LONG = 512, 8192
TIMES = PassTimes(jitter=0.03)
MIXED = [poisson(16.0, SHORT, 128, 8.0, seed) + poisson(1.0, LONG, 128, 8.0, 100 + seed) for seed in (1, 2, 3, 4)]


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


def mixed(traces: Sequence[list[Arrival]] = MIXED, **config: Any) -> tuple[dict[str, float], float]:
    """The figures of the traces, and the part of their time in which the device had nothing to do."""
    simulations = [Simulation(TIMES, **config) for _ in traces]
    timelines = [simulation.run(trace) for simulation, trace in zip(simulations, traces, strict=True)]
    return figures([*chain(*timelines)]), max(simulation.idle_share for simulation in simulations)


@pytest.fixture(scope="module")
def before() -> dict[str, float]:
    return figures([*chain(*(Alternating(TIMES, 8192).run(trace) for trace in MIXED))])


@pytest.fixture(scope="module", params=["deadline", "lpm", "fcfs"])
def after(request: pytest.FixtureRequest, before: dict[str, float]) -> dict[str, float]:
    found, idle_share = mixed(schedule_policy=request.param)
    print(f"\n{'ms':16}{'alternating':>12}{request.param:>12}")
    for name, value in found.items():
        print(f"{name:16}{before[name]:12.1f}{value:12.1f}")
    assert idle_share < 0.001
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


def test_planning_late_brings_first_tokens_sooner_and_costs_nothing() -> None:
    """Against passes that are planned as soon as the one before them has begun."""
    (early, _), (late, idle_share) = (mixed(MIXED[2:], plans_late=plans_late) for plans_late in (False, True))
    print(f"\n{'ms':16}{'early':>12}{'late':>12}")
    for name, value in late.items():
        print(f"{name:16}{early[name]:12.1f}{value:12.1f}")
    assert late["short TTFT p50"] <= early["short TTFT p50"] - 1.5
    assert late["short TTFT p99"] <= 0.95 * early["short TTFT p99"]
    assert late["e2e p50"] <= early["e2e p50"] and late["ITL p99"] <= early["ITL p99"] + 1.0
    assert idle_share < 0.001


@pytest.mark.parametrize(("num_reqs", "least_part"), [(64, 0.99), (256, 0.96)])
def test_many_at_once_take_as_long_as_with_full_passes_by_turns(num_reqs: int, least_part: float) -> None:
    """A token beside full passes costs as much as one of a prompt; passes without prompts have room for it."""
    arrivals = [Arrival(0.0003 * number, SHORT, 64) for number in range(num_reqs)]
    ends = {
        name: max(one.token_times[-1] for one in run(arrivals))
        for name, run in (
            ("by turns", Alternating(TIMES, 8192).run),
            ("early", Simulation(TIMES, plans_late=False).run),
            ("late", Simulation(TIMES).run),
        )
    }
    print(f"\n{num_reqs} at once", {name: f"{num_reqs * 64 / seconds:.0f} tokens/s" for name, seconds in ends.items()})
    assert least_part * ends["late"] <= ends["by turns"]
    assert 0.998 * ends["late"] <= ends["early"]


@pytest.mark.parametrize("times", [PassTimes(jitter=0.3), PassTimes(host_s=0.004)])
def test_passes_that_cannot_be_foreseen_or_are_too_short_keep_the_device_at_work(times: PassTimes) -> None:
    early, late = (Simulation(times, plans_late=plans_late) for plans_late in (False, True))
    for simulation in (early, late):
        simulation.run([arrival for arrival in MIXED[3] if arrival.at_s < 4.0])
    assert late.idle_share <= early.idle_share + 0.005


def test_a_prompt_that_comes_during_a_pass_is_in_the_next_one() -> None:
    """A long prompt beside a stream: passes of 38 ms. Whoever comes early in one need not wait for two more."""
    company = [Arrival(0.0, 16, 400), *(Arrival(1.0 + 0.5 * number, 16_000, 1) for number in range(4))]
    shorts = [Arrival(2.6 + 0.047 * number, 128, 1) for number in range(6)]
    worst = {}
    for plans_late in (False, True):
        simulation = Simulation(plans_late=plans_late)
        timelines = simulation.run([*company, *shorts])
        worst[plans_late] = max(one.ttft_s for one in timelines if one.arrival.num_in == 128)
        assert simulation.channel.longest_wait_s <= MAX_WAIT_S, "so that the end of the process is seen"
    assert worst[True] < 2 * 0.04 < worst[False] < 3 * 0.04


def test_while_nothing_decodes_a_pass_is_no_longer_than_who_comes_can_wait() -> None:
    """The first long prompt shows what tokens cost."""
    longs = [Arrival(2.0 * number, 32_000, 1) for number in range(4)]
    timelines = Simulation().run([*longs, *(Arrival(4.1 + 0.1 * number, 128, 1) for number in range(5))])
    assert max(one.ttft_s for one in timelines if one.arrival.num_in == 128) < 2 * 0.11
    alone = Simulation(chunked_prefill_size=32_000).run(longs)[-1]
    assert timelines[-1].ttft_s < 1.02 * alone.ttft_s


def test_short_prompts_do_not_starve_a_long_one() -> None:
    """They alone would keep the ranks at work for ever; every prompt would be tried before the long one by length."""
    shorts = [Arrival(0.01 * number, SHORT, 1) for number in range(400)]  # 10 ms of work each 10 ms
    (long,) = (
        one for one in Simulation(ROUND_TIMES).run([*shorts, Arrival(0.5, LONG, 1)]) if one.arrival.num_in == LONG
    )
    alone = Simulation(ROUND_TIMES).run([Arrival(0.0, LONG, 1)])[0].ttft_s
    assert long.ttft_s < 6 * alone


def test_long_prompts_do_not_starve_a_short_one() -> None:
    """It waits for the pass under way and the one that is planned ahead, and is in the next."""
    longs = [Arrival(0.0, 32_000, 64) for _ in range(4)]
    timelines = Simulation(ROUND_TIMES).run([*longs, *(Arrival(0.5 + 0.1 * number, 128, 1) for number in range(10))])
    assert max(one.ttft_s for one in timelines if one.arrival.num_in == 128) < 3 * ROUND_TIMES.seconds(8192, 32_000)
    assert max(one.ttft_s for one in timelines) < 3.5


def test_a_request_that_needs_much_room_is_not_overtaken_for_ever() -> None:
    """There is room for some small ones or for the large one; small ones come all the time."""
    smalls = [Arrival(0.02 * number, SHORT, 64) for number in range(150)]
    simulation = Simulation(ROUND_TIMES, num_tokens=9000)
    (large,) = (one for one in simulation.run([*smalls, Arrival(1.0, 6000, 8)]) if one.arrival.num_in == 6000)
    assert large.ttft_s < 1.5


def test_a_full_cache_lets_everyone_end_and_nobody_start_over_again_and_again() -> None:
    arrivals = [Arrival(0.001 * number, 300, 400) for number in range(60)]
    simulation = Simulation(ROUND_TIMES, num_tokens=20_000)
    timelines = simulation.run(arrivals)
    assert all(len(timeline.token_times) == 400 for timeline in timelines)
    assert 0 < simulation.scheduler.running.num_retracted < 60


def test_prompts_that_share_a_prefix_compute_it_once() -> None:
    arrivals = [Arrival(0.0, 4000, 1, prefix=1) for _ in range(8)]
    shared = max(one.ttft_s for one in Simulation(ROUND_TIMES).run(arrivals))
    alone = max(one.ttft_s for one in Simulation(ROUND_TIMES).run([Arrival(0.0, 4000, 1) for _ in range(8)]))
    assert shared < 0.6 * alone
