"""What /metrics says that no running server is needed for."""

import re
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import Histogram
from ramet.srt.entrypoints.http.http_counts import HttpCounts
from ramet.srt.entrypoints.standby.standby_metrics import StandbyMetrics
from ramet.srt.managers.generation import RunningSequence
from ramet.srt.managers.io_struct import (
    FinishReason,
    GetInternalStateReqOutput,
    LinearStateStats,
    RequestOutput,
    TokenizedGenerateReqInput,
)
from ramet.srt.managers.metrics import TOKEN_BUCKETS, Metrics
from ramet.srt.sampling.sampling_params import SamplingParams
from ramet.srt.weights.report import LoadReport


def test_what_each_seed_gave_of_a_load_that_files_completed() -> None:
    metrics = Metrics("m")
    report = LoadReport(
        source="transfer_engine+checkpoint",
        num_bytes=10,
        seconds=1.0,
        verified=True,
        taken_from=("a:1", "b:2"),
        taken_bytes=(4, 3),
    )
    metrics.observe_load(1, report)
    lines = metrics.render().decode().splitlines()
    assert 'ramet:weight_load_bytes{model_name="m",rank="1",source="transfer_engine+checkpoint"} 10.0' in lines
    assert 'ramet:weight_load_taken_bytes{model_name="m",rank="1",seed="a:1"} 4.0' in lines
    assert 'ramet:weight_load_taken_bytes{model_name="m",rank="1",seed="b:2"} 3.0' in lines


def test_tokens_and_their_times_are_counted_as_the_library_does() -> None:
    reference = Histogram("reference", "", buckets=TOKEN_BUCKETS, registry=None)
    metrics = Metrics("m")
    for num_tokens, gaps_s in ((1, []), (1, [0.001]), (4, [0.01, 0.002, 0.02, 0.5]), (2, [0.0011, 100.0])):
        metrics.tokens.observe(num_tokens, gaps_s)
        for gap_s in gaps_s:
            reference.observe(gap_s)
    lines = metrics.render().decode().splitlines()
    assert 'ramet:generation_tokens_total{model_name="m"} 8.0' in lines
    for sample in next(iter(reference.collect())).samples:
        labels = "".join(f'le="{bound}",' for bound in sample.labels.values())
        name = sample.name.removeprefix("reference")
        if name != "_created":
            found = [line for line in lines if line.startswith(f"ramet:inter_token_latency_seconds{name}{{{labels}")]
            assert [float(line.split()[-1]) for line in found] == [pytest.approx(sample.value)], sample


def an_output(token_ids: list[int], queue_time_s: float, gaps_s: Sequence[float] = ()) -> RequestOutput:
    return RequestOutput(
        rid="r", token_ids=token_ids, finish_reason=None, prompt_tokens=5, completion_tokens=0, cached_tokens=2,
        queue_time_s=queue_time_s, prefill_time_s=0.2, gaps_s=list(gaps_s),
    )  # fmt: skip


def a_sequence(**fields: Any) -> RunningSequence:
    request = TokenizedGenerateReqInput(rid="r", input_ids=[1] * 5, sampling_params=SamplingParams(), **fields)
    return RunningSequence(request=request, created_s=10.0, queue_time_s=0.3, prefill_time_s=0.2)


def value(metrics: Metrics, name: str) -> float:
    found = re.search(rf'^ramet:{name}\{{model_name="m"\}} (\S+)$', metrics.render().decode(), re.MULTILINE)
    assert found is not None, name
    return float(found[1])


@pytest.mark.parametrize(("is_stream", "ttft_s"), [(True, 0.6), (False, 0.5)])
def test_what_is_not_streamed_has_its_first_token_when_it_was_computed(is_stream: bool, ttft_s: float) -> None:
    metrics, sequence = Metrics("m"), a_sequence(stream=is_stream)
    ids, gaps_s, now = ([7], [], 10.6) if is_stream else ([7, 8, 9], [0.1, 0.9], 11.5)
    sequence.output_ids = ids
    metrics.observe_output(sequence, an_output(ids, 0.3, gaps_s), now, begins=True)
    metrics.observe_output(sequence, an_output([6], 0.3, [0.4]), now + 0.4, begins=False)
    assert value(metrics, "time_to_first_token_seconds_sum") == pytest.approx(ttft_s)
    assert value(metrics, "inter_token_latency_seconds_count") == len(gaps_s) + 1
    assert value(metrics, "inter_token_latency_seconds_sum") == pytest.approx(sum(gaps_s) + 0.4)
    assert value(metrics, "generation_tokens_total") == len(ids) + 1 and value(metrics, "prompt_tokens_total") == 5


def test_who_leaves_the_queue_has_waited_and_got_nothing() -> None:
    metrics, sequence = Metrics("m"), a_sequence()
    sequence.finish_reason = FinishReason(type="abort", status_code=499)
    metrics.observe_output(sequence, an_output([], 0.3), 10.6, begins=False)
    assert value(metrics, "queue_time_seconds_sum") == 0.3 and value(metrics, "prompt_tokens_total") == 0
    metrics.observe_output(sequence, an_output([], 0.0), 10.6, begins=False)  # it was refused
    assert value(metrics, "queue_time_seconds_count") == 1
    assert value(metrics, "time_to_first_token_seconds_count") == 0


def test_the_oldest_that_waits_is_that_of_all_replicas() -> None:
    metrics = Metrics("m")
    states = [
        GetInternalStateReqOutput(
            request_id="", num_running_reqs=1, num_waiting_reqs=int(age_s > 0), queue_oldest_s=age_s, num_used_tokens=0,
            num_cached_tokens=0, max_total_num_tokens=1, num_retracted_reqs=0, last_gen_throughput=0.0,
        )
        for age_s in (0.0, 7.5, 2.0)
    ]  # fmt: skip
    metrics.observe_states(states)
    assert value(metrics, "queue_oldest_seconds") == 7.5
    for fewer in (states[:1], []):  # while an instance starts, it has none
        metrics.observe_states(states)
        metrics.observe_states(fewer)
        assert value(metrics, "queue_oldest_seconds") == 0.0


def test_states_of_linear_layers_are_summed_over_replicas() -> None:
    metrics = Metrics("m")
    common = dict.fromkeys(
        ("num_running_reqs", "num_waiting_reqs", "num_used_tokens", "num_cached_tokens", "num_retracted_reqs"), 0
    )
    names = ("slots", "slots_used", "snapshots", "snapshot_hits", "snapshot_evictions")
    some = LinearStateStats(num_slots=7, num_used=2, num_snapshots=3, num_hits=5, num_evictions=1)
    for states, shown in ((some, [14, 4, 6, 10, 2]), (None, [0] * 5)):
        one = GetInternalStateReqOutput(
            request_id="", max_total_num_tokens=1, last_gen_throughput=0.0, linear_states=states, **common
        )
        metrics.observe_states([one, one])
        assert [value(metrics, f"state_{name}") for name in names] == shown


def test_a_request_in_the_histograms_of_dashboards() -> None:
    metrics = Metrics("m")
    sequence = a_sequence(lora_name="a")
    metrics.observe_output(sequence, an_output([7], 0.3), 10.6, begins=True)
    sequence.output_ids, sequence.last_output_s = [7, 8, 9], 11.5
    metrics.observe_end(sequence, FinishReason(type="stop"))
    lines = metrics.render().decode().splitlines()
    for line in (
        'ramet:queue_time_seconds_sum{model_name="m"} 0.3',
        'ramet:queue_time_seconds_bucket{le="0.5",model_name="m"} 1.0',
        'ramet:time_per_output_token_seconds_sum{model_name="m"} 0.5',
        'ramet:prompt_tokens_histogram_sum{model_name="m"} 5.0',
        'ramet:prompt_tokens_histogram_bucket{le="4.0",model_name="m"} 0.0',
        'ramet:generation_tokens_histogram_sum{model_name="m"} 3.0',
        'ramet:lora_requests_total{lora_name="a",model_name="m"} 1.0',
    ):
        assert line in lines, line
    metrics.forget_adapter("a")
    metrics.forget_adapter("never counted")
    assert "lora_name" not in metrics.render().decode()


def test_the_page_has_every_metric_with_its_kind_and_labels() -> None:
    metrics = Metrics("m")
    metrics.registry.register(HttpCounts("m"))
    metrics.registry.register(StandbyMetrics(SimpleNamespace(is_standby=False, num_kept=0)))
    made = set(re.findall(r"^# TYPE (\S+) (\w+)$", metrics.render().decode(), re.MULTILINE))
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    assert set(re.findall(r"^\| `(ramet:\w+)` \| (\w+) \|", page, re.MULTILINE)) == made


def test_a_thousand_adapters_are_scraped_within_50_ms() -> None:
    """Of this process's time, as a machine has it that does nothing else."""
    metrics, counts = Metrics("m"), HttpCounts("m")
    metrics.registry.register(counts)
    for number in range(1000):
        request = TokenizedGenerateReqInput(
            rid="r", input_ids=[1], sampling_params=SamplingParams(), lora_name=f"adapter-{number}"
        )
        metrics.observe_end(RunningSequence(request=request, created_s=1.0), FinishReason(type="stop"))
        counts.count(f"/route-{number % 40}", "POST", 200 + number % 25)
    seconds = []
    for _ in range(5):
        start = time.process_time()
        text = metrics.render()
        seconds.append(time.process_time() - start)
    assert text.count(b"\nramet:lora_requests_total{") == 1000 and text.count(b"\nramet:http_responses_total{") == 200
    assert min(seconds) < 0.05
