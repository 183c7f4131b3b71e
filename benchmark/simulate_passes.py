"""The real scheduler against ranks that only take time, on a simulated clock; docs/scheduling.md has the results.

    python benchmark/simulate_passes.py [--traces 4] [--seconds 20] [--markdown]

A trace has 16 prompts of 512 tokens and one of 8192 a second, 128 tokens out; a burst has requests of 512 tokens that
come at once, 256 out. What a pass takes is test/simulated_passes.py's formula, of figures measured on an H200.
"""

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "test"))
from simulated_passes import Alternating, Arrival, PassTimes, Simulation, Timeline, poisson

SHORT, LONG = 512, 8192
JITTER = 0.03
Run = Callable[[Iterable[Arrival]], list[Timeline]]


def rules() -> dict[str, Callable[[], Run]]:
    """What is compared; each makes a new scheduler."""
    times = PassTimes(jitter=JITTER)
    return {
        "by turns": lambda: Alternating(times, 8192).run,
        "mixed, early": lambda: Simulation(times, plans_late=False).run,
        "mixed, late": lambda: Simulation(times).run,
        **{
            f"{1000 * target_s:.0f} ms, strict": lambda target_s=target_s: (
                Simulation(  # type: ignore[misc]
                    times, target_itl_s=target_s, most_itl_s=target_s
                ).run
            )
            for target_s in (0.03, 0.04, 0.05)
        },
    }


def percentile(values: list[float], percent: float) -> float:
    return sorted(values)[int((len(values) - 1) * percent / 100)]


def trace_figures(make: Callable[[], Run], num_traces: int, seconds: float) -> dict[str, float]:
    """Of the traces, each figure the mean of them, in milliseconds."""
    figures: dict[str, list[float]] = {}
    for seed in range(1, num_traces + 1):
        timelines = make()(poisson(16.0, SHORT, 128, seconds, seed) + poisson(1.0, LONG, 128, seconds, 100 + seed))
        gaps = [gap for one in timelines for gap in one.gaps_s]
        first = {length: [one.ttft_s for one in timelines if one.arrival.num_in == length] for length in (SHORT, LONG)}
        for name, value in (
            ("token time p50", percentile(gaps, 50)),
            ("token time p99", percentile(gaps, 99)),
            ("token time, longest", max(gaps)),
            ("first token of the short, p50", percentile(first[SHORT], 50)),
            ("first token of the short, p99", percentile(first[SHORT], 99)),
            ("first token of the long, p50", percentile(first[LONG], 50)),
            ("first token of the long, p99", percentile(first[LONG], 99)),
            ("end to end, p50", percentile([one.e2e_s for one in timelines], 50)),
        ):
            figures.setdefault(f"{name}, ms", []).append(1000 * value)
    return {name: fmean(values) for name, values in figures.items()}


def burst_figures(make: Callable[[], Run]) -> dict[str, float]:
    """Tokens per second of requests that come at once."""
    found = {}
    for number in (64, 256):
        timelines = make()([Arrival(0.0003 * place, SHORT, 256) for place in range(number)])
        found[f"{number} at once, tokens/s"] = number * 256 / max(one.token_times[-1] for one in timelines)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--traces", type=int, default=4, help="traces, each figure the mean of them")
    parser.add_argument("--seconds", type=float, default=20.0, help="length of a trace")
    parser.add_argument("--markdown", action="store_true", help="print a table as docs/scheduling.md has it")
    args = parser.parse_args()
    table = {
        name: trace_figures(make, args.traces, args.seconds) | burst_figures(make) for name, make in rules().items()
    }
    rows = [["simulated", *table], *([figure] for figure in next(iter(table.values())))]
    for row in rows[1:]:
        row += [f"{of[row[0]]:.0f}" if of[row[0]] >= 100 else f"{of[row[0]]:.1f}" for of in table.values()]
    if args.markdown:
        rows.insert(1, ["---"] * len(rows[0]))
    for row in rows:
        print(f"| {' | '.join(row)} |" if args.markdown else f"{row[0]:34}" + "".join(f"{one:>14}" for one in row[1:]))


if __name__ == "__main__":
    main()
