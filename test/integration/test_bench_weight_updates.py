"""The parts of the scripts that measure and watch updates of weights: which gaps count, and what growth is."""

import argparse
import sys
from array import array
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmark"))
import bench_weight_updates as bench  # noqa: E402 - its folder is made importable above
import soak_updates as soak  # noqa: E402 - its folder is made importable above
from completion_load import Outcome  # noqa: E402 - its folder is made importable above

SAMPLE = soak.Sample(own_bytes=300 << 20, memory_file_bytes=8 << 20, num_files=100, num_threads=40, num_processes=5)
CALL = {"start": 10.0, "end": 10.4, "pause_seconds": 0.01, "num_bytes": 1000, "source": "local_copy", "gap_s": 0.02,
        "stage_seconds": 0.5, "transfer_seconds": 0.1}  # fmt: skip


def make_streams(*times: list[float]) -> bench.Streams:
    streams = bench.Streams("http://nobody", 100, argparse.Namespace(concurrency=1, output_len=1))
    streams.begin_s = 100.0
    streams.outcomes = [Outcome(times=array("d", one)) for one in times]
    return streams


def test_the_longest_gap_is_one_that_an_update_has_a_part_in() -> None:
    streams = make_streams([0.0, 5.0, 5.1, 5.2, 7.0], [4.0, 5.15, 5.4])
    assert streams.longest_gap(105.05, 105.12) == pytest.approx(1.15)  # of the second stream
    assert streams.longest_gap(105.12, 105.15) == pytest.approx(1.15)
    assert streams.longest_gap(105.3, 105.35) == pytest.approx(1.8)
    assert streams.longest_gap(108.0, 109.0) is None
    assert streams.gaps_outside([(105.3, 105.35)]) == pytest.approx([5.1 - 5.0, 5.2 - 5.1, 5.15 - 4.0])


def test_figures_of_calls() -> None:
    figures = bench.describe([CALL, CALL | {"gap_s": None, "end": 10.8}], 20_000.0)
    assert figures["num"] == 2 and figures["num_under_load"] == 1 and figures["gap_ms"]["p99"] == 20.0
    assert figures["transfer_rate"] == pytest.approx(10_000) and figures["transfer_over_copy"] == pytest.approx(0.5)
    assert figures["served_s"] == pytest.approx({"p50": 0.8, "p99": 0.8})
    back = bench.describe([CALL | {"num_bytes": 0, "gap_s": None}], 1.0)
    assert "source" not in back and back["gap_ms"] == {"p50": None, "p99": None}
    values = {"update": figures, "rollback": back, "quiet_gaps_ms": bench.cuts_of([]), "tokens_per_s_before": 1.0,
              "tokens_per_s_after": 1.0, "sleep": {"rounds": [{"source": "peer", "sleep_s": 1.0, "wake_s": 2.0,
                                                              "wake_to_token_s": 3.0, "given_back": 0.5}]}}  # fmt: skip
    rows = dict(bench.rows_of(values))
    assert rows["gaps without updates, p50, p99"] == "-, - ms"
    assert rows["sleep, wake, wake to a token, from peer"].endswith("s, 50.0% given back")


@pytest.mark.parametrize("name", ["own_bytes", "memory_file_bytes", "num_files", "num_threads", "num_processes"])
def test_what_grows_with_each_change_is_found(name: str) -> None:
    step = max(1, getattr(soak.BOUNDS, name) // 4)
    samples = [replace(SAMPLE, **{name: getattr(SAMPLE, name) + step * i}) for i in range(14)]
    (growth,) = soak.find_growth(samples, warm_up=2)
    assert growth.startswith(f"{name} has grown from ")


def test_what_stays_is_no_growth_and_too_few_samples_say_nothing() -> None:
    samples = [replace(SAMPLE, num_files=200), *[SAMPLE] * 4, replace(SAMPLE, num_threads=99), *[SAMPLE] * 4]
    assert soak.find_growth(samples, warm_up=1) == []
    assert "nothing can be said" in soak.find_growth(samples[:7], warm_up=1)[0]
