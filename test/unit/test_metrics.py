"""What /metrics says that no running server is needed for."""

import re
import time
from pathlib import Path

import pytest
from prometheus_client import Histogram
from ramet.srt.entrypoints.http.http_counts import HttpCounts
from ramet.srt.managers.generation import RunningSequence
from ramet.srt.managers.io_struct import FinishReason, TokenizedGenerateReqInput
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
    metrics.tokens.observe_first(3)
    for num_tokens, seconds in ((1, 0.001), (4, 0.01), (1, 0.0011), (2, 100.0)):
        metrics.tokens.observe_next(num_tokens, seconds)
        for _ in range(num_tokens):
            reference.observe(seconds / num_tokens)
    lines = metrics.render().decode().splitlines()
    assert 'ramet:generation_tokens_total{model_name="m"} 11.0' in lines
    for sample in next(iter(reference.collect())).samples:
        labels = "".join(f'le="{bound}",' for bound in sample.labels.values())
        name = sample.name.removeprefix("reference")
        if name != "_created":
            found = [line for line in lines if line.startswith(f"ramet:inter_token_latency_seconds{name}{{{labels}")]
            assert [float(line.split()[-1]) for line in found] == [pytest.approx(sample.value)], sample


def test_a_request_in_the_histograms_of_dashboards() -> None:
    metrics = Metrics("m")
    request = TokenizedGenerateReqInput(rid="r", input_ids=[1] * 5, sampling_params=SamplingParams(), lora_name="a")
    sequence = RunningSequence(request=request, created_s=10.0, queue_time_s=0.3, prefill_time_s=0.2)
    metrics.observe_output(sequence, 1, 10.6, None)
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
