"""What operators see of an instance: its log, its traces, its metrics; from its start to an update of its weights."""

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from otlp_collector import Collector, attributes
from random_models import make_model
from server_process import ServerProcess, wait_until
from tls_server import make_certificates, trust

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SOON = {"OTEL_BSP_SCHEDULE_DELAY": "50"}
SEED_IP = "--remote-instance-weight-loader-seed-instance-ip"


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), "llama2")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def seed(
    model: Path, certificates: Path, collector: Collector, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """An instance that is reached by https, told all by a file: JSON lines, whole requests, traces by gRPC."""
    folder = tmp_path_factory.mktemp("seed")
    config = {
        "served-model-name": ["tiny", "tiny-alias"],
        "ssl_certfile": str(certificates / "server.pem"),
        "ssl_keyfile": str(certificates / "server.key"),
        "ssl_ca_certs": str(certificates / "ca.pem"),
        "log_format": "json",
        "log_requests": True,
        "log_requests_level": 3,
        "root_path": "/llm",
        "otlp_traces_endpoint": f"127.0.0.1:{collector.grpc_port}",
        "remote_instance_weight_loader_start_seed_via_transfer_engine": True,
        "engine_info_bootstrap_port": 0,
        "max_total_tokens": 2048,
        "enable-metrics": True,
        "modelexpress_config": {"url": "embedded:0", "source": True},
    }
    (folder / "config.yaml").write_text(json.dumps(config))
    flags = ("--config", str(folder / "config.yaml"), "--served-model-name", "tiny", "tiny-alias")
    with ServerProcess(model, folder / "log", *flags, fake=False, verify=trust(certificates), **SOON) as server:
        yield server.wait_ready()


@pytest.fixture
def http(seed: ServerProcess, certificates: Path) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=seed.url, verify=trust(certificates), timeout=30) as client:
        yield client


def records(server: ServerProcess) -> list[dict[str, Any]]:
    """Every line of the log, each of which is one JSON object."""
    return [json.loads(line) for line in server.output.splitlines()]


def record_of(server: ServerProcess, request_id: str) -> dict[str, Any]:
    def find() -> dict[str, Any] | None:
        found = [one for one in records(server) if one.get("request_id") == request_id and "status" in one]
        return found[0] if found else None

    return wait_until(find, f"a line about {request_id}", 10)


def test_the_start_says_what_it_does(seed: ServerProcess) -> None:
    messages = [record["message"] for record in records(seed)]
    assert messages[0] == "--enable-metrics is not needed: /metrics is always there"
    assert messages[1] == f"starting; users will be served on {seed.url}"
    listening, ready = f"listening on {seed.url}", next(one for one in messages if one.startswith("ready on https://"))
    assert messages.index(listening) < messages.index(ready)
    assert any(re.fullmatch("rank 0: loaded target weights from checkpoint: .* GB/s", one) for one in messages)
    assert {record["process"] for record in records(seed)} >= {"server", "scheduler 0"}


def test_a_finished_request_is_one_line(seed: ServerProcess, http: httpx.Client) -> None:
    body = {"model": "tiny-alias", "prompt": 'a "quoted"\nprompt', "max_tokens": 3, "temperature": 0.5}
    answer = http.post("/llm/v1/completions", json=body, headers={"X-Request-Id": "done-1"}).json()
    assert answer["model"] == "tiny-alias"
    line = record_of(seed, "done-1")
    expected = {"level": "INFO", "process": "server", "method": "POST", "path": "/llm/v1/completions", "status": 200,
                "completion_tokens": 3, "prompt_tokens": answer["usage"]["prompt_tokens"], "finish_reason": "length",
                "inputs": [body["prompt"]], "outputs": [answer["choices"][0]["text"]], "client": "127.0.0.1",
                "weight_version": "default"}  # fmt: skip
    assert {name: line[name] for name in expected} == expected
    assert line["rid"].startswith("done-1-") and line["sampling_params"]["temperature"] == 0.5
    assert 0 <= line["queue_seconds"] <= line["ttft_seconds"] <= line["seconds"] < 30
    combined = (
        r'127\.0\.0\.1 - - \[\d\d/\w{3}/\d{4}:[\d:]{8} \+0000\] "POST /llm/v1/completions HTTP/1\.1" 200 \d+ "-" "'
    )
    assert re.match(combined, line["message"])


def test_a_stream_is_one_line_too(seed: ServerProcess, http: httpx.Client) -> None:
    body = {"text": "a", "sampling_params": {"max_new_tokens": 4}, "stream": True}
    headers = {"X-Request-Id": "stream-1"}
    with http.stream("POST", "/generate", json=body, headers=headers) as response:
        size = sum(len(chunk) for chunk in response.iter_raw())
        assert response.headers["x-request-id"] == "stream-1"
    line = record_of(seed, "stream-1")
    assert (line["completion_tokens"], line["bytes"], line["status"]) == (4, size, 200)


@pytest.mark.parametrize("is_stream", [False, True])
async def test_who_leaves_is_a_line_with_what_was_computed(
    seed: ServerProcess, http: httpx.Client, certificates: Path, is_stream: bool
) -> None:
    def counted(name: str) -> float:
        text = http.get("/metrics").text
        return float(re.search(rf'^ramet:{name}\{{model_name="tiny"\}} (\S+)', text, re.MULTILINE)[1])

    names = ("prompt_tokens_total", "generation_tokens_total", "inter_token_latency_seconds_count")
    before = {name: counted(name) for name in names}
    body = {"prompt": "a", "max_tokens": 480, "ignore_eos": True, "stream": is_stream}
    headers = {"X-Request-Id": f"leaves-{is_stream}"}
    async with asyncio.timeout(30), httpx.AsyncClient(base_url=seed.url, verify=trust(certificates)) as client:
        asking = asyncio.create_task(client.post("/v1/completions", json=body, headers=headers))
        while counted("num_used_tokens") < 100:
            await asyncio.sleep(0.005)
        asking.cancel()
        await asyncio.wait([asking])
    line = record_of(seed, headers["X-Request-Id"])
    assert line["status"] == (200 if is_stream else 499) and line["finish_reason"] == "abort"
    assert 0 < line["completion_tokens"] < 480
    assert 0 < line["queue_seconds"] < line["ttft_seconds"] < line["seconds"]
    gained = {name: counted(name) - before[name] for name in names}
    num_tokens = line["completion_tokens"]
    assert gained == dict(zip(names, (line["prompt_tokens"], num_tokens, num_tokens - 1), strict=True))


@pytest.mark.parametrize(
    ("path", "body", "status", "reason"),
    [
        ("/v1/completions", {"model": "other", "prompt": "a"}, 404, "the model 'other' does not exist"),
        ("/v1/chat/completions", {"messages": []}, 400, "messages"),
        ("/v1/messages", {"model": "tiny", "messages": [], "max_tokens": 1}, 400, "messages must not be empty"),
        ("/nothing", {}, 404, "there is no route /nothing"),
    ],
)
def test_a_refused_request_is_one_line_with_the_reason(
    seed: ServerProcess, http: httpx.Client, path: str, body: dict[str, Any], status: int, reason: str
) -> None:
    answer = http.post(path, json=body)
    assert answer.status_code == status
    line = record_of(seed, answer.headers["x-request-id"])
    assert line["status"] == status and reason in line["error"] and line["error"] == answer.json()["error"]["message"]


def test_a_request_has_a_span_in_its_callers_trace(http: httpx.Client, collector: Collector) -> None:
    body = {"prompt": ["a", "b"], "max_tokens": 3}
    headers = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01", "X-Request-Id": "traced"}
    assert http.post("/v1/completions", json=body, headers=headers).status_code == 200
    (span,) = wait_until(
        lambda: [one for one in collector.wait_for("POST /v1/completions") if one.trace_id.hex() == TRACE_ID],
        "the span",
    )
    assert span.parent_span_id.hex() == PARENT_ID and collector.services == {"ramet"}
    facts = attributes(span)
    assert facts["http.response.status_code"] == 200 and facts["ramet.request_id"] == "traced"
    sequences = collector.children(span, "generate")
    assert [attributes(one)["gen_ai.usage.output_tokens"] for one in sequences] == [3, 3]
    parts = [collector.children(sequences[0], name)[0] for name in ("queue", "prefill", "decode")]
    ends = [sequences[0].start_time_unix_nano, *(part.end_time_unix_nano for part in parts)]
    starts = [part.start_time_unix_nano for part in parts]
    assert ends[:-1] == starts and ends[-1] == sequences[0].end_time_unix_nano and ends == sorted(ends)


def test_a_refused_request_is_a_failed_span(http: httpx.Client, collector: Collector) -> None:
    assert http.post("/tokenize", json={}).status_code == 400
    (span,) = collector.wait_for("POST /tokenize")
    assert span.status.code == 2 and "prompt" in span.status.message
    http.get("/metrics")
    assert not [one for one in collector.spans if "health" in one.name or "metrics" in one.name]


def test_the_start_is_a_span_with_its_load(collector: Collector) -> None:
    (start,) = collector.wait_for("start")
    (load,) = collector.children(start, "load weights")
    facts = attributes(load)
    assert facts["ramet.weights.source"] == "checkpoint" and facts["ramet.weights.bytes"] > 0
    assert start.start_time_unix_nano <= load.start_time_unix_nano <= load.end_time_unix_nano


def test_other_weights_are_a_line_and_a_span(
    seed: ServerProcess, http: httpx.Client, model: Path, collector: Collector
) -> None:
    body = {"model_path": str(model), "weight_version": "v2"}
    answer = http.post("/update_weights_from_disk", json=body, headers={"X-Request-Id": "update-1"})
    assert answer.status_code == 200, answer.text
    lines = [one for one in records(seed) if one.get("request_id") == "update-1"]
    assert any(f"the weights are those of {model} (v2)" in one["message"] for one in lines)
    request = next(
        one
        for one in collector.wait_for("POST /update_weights_from_disk")
        if attributes(one)["ramet.request_id"] == "update-1"
    )
    (update,) = collector.children(request, "update weights")
    assert attributes(update)["ramet.weights.version"] == "v2"


def test_a_clone_by_https_says_whence_its_weights_are(
    seed: ServerProcess, model: Path, certificates: Path, collector: Collector, tmp_path: Path
) -> None:
    """It finds its seed, and that it is reached by https, at a metadata server. Its traces go by HTTP."""
    words = " ".join(record["message"] for record in records(seed))
    address = re.search(r"embedded ModelExpress server at (\S+);", words)
    config = {"url": address[1], "wait_timeout": 20}
    flags = ["--load-format", "remote_instance", "--remote-instance-weight-loader-fallback", "error",
             "--remote-instance-weight-loader-backend", "modelexpress", "--modelexpress-config", json.dumps(config),
             "--ssl-ca-certs", str(certificates / "ca.pem"), "--engine-info-bootstrap-port", "0", "--max-total-tokens",
             "512", "--decode-log-interval", "2", "--served-model-name", "tiny", "--otlp-traces-endpoint",
             f"http://127.0.0.1:{collector.http_port}"]  # fmt: skip
    protocol = {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"}
    with ServerProcess(model, tmp_path / "log", *flags, fake=False, **protocol, **SOON).wait_ready() as clone:
        assert re.search(r"INFO rank 0: loaded target weights from local_\w+: .*checksums verified", clone.output)
        body = {"prompt": "a", "max_tokens": 6}
        assert httpx.post(f"{clone.url}/v1/completions", json=body, timeout=30).status_code == 200
        state = r"#running-req: 1, #queue-req: 0, gen throughput \(token/s\): [\d.]+, .* token usage: 0\.\d\d"
        wait_until(lambda: re.search(state, clone.output), "a line about the scheduler", 10)
        refused = httpx.post(f"{clone.url}/v1/completions", json={"prompt": ""}, headers={"X-Request-Id": "no"})
        line = f"refused: POST /v1/completions from 127.0.0.1: {refused.status_code} "
        line += f"{refused.json()['error']['message']} request_id=no"
        wait_until(lambda: line in clone.output, "the line about a refusal", 10)
        start = collector.wait_for("start", 2)[1]
        (load,) = collector.children(start, "load weights")
        report = httpx.get(f"{clone.url}/server_info").json()["ranks"][0]["load_report"]
        assert attributes(load)["ramet.weights.taken_from"] == report["taken_from"] and report["instances"] == [
            seed.url
        ]


def test_a_seed_without_its_flag_is_named_to_the_client(model: Path, collector: Collector, tmp_path: Path) -> None:
    with ServerProcess(model, tmp_path / "seed-log").wait_ready() as other:  # it offers nothing
        flags = ["--load-format", "remote_instance", "--remote-instance-weight-loader-fallback", "error", SEED_IP]
        flags += [other.url.removeprefix("http://"), "--engine-info-bootstrap-port", "0", "--max-total-tokens", "512"]
        flags += ["--otlp-traces-endpoint", f"127.0.0.1:{collector.grpc_port}"]
        with ServerProcess(model, tmp_path / "log", *flags, fake=False, **SOON) as client:
            assert client.wait_exit() == 1
    (error,) = [line for line in client.output.splitlines() if "error:" in line]
    assert "this instance gives its weights to nobody: it was started without" in error
    assert "--remote-instance-weight-loader-start-seed-via-transfer-engine" in error
    (failed,) = [span for span in collector.wait_for("start", 3) if span.status.code == 2]
    assert "gives its weights to nobody" in failed.status.message


def test_metrics_of_all_that(http: httpx.Client) -> None:
    text = http.get("/metrics").text
    for line in (
        'ramet:http_responses_total{endpoint="/v1/completions",method="POST",model_name="tiny",status_code="404"} 1.0',
        'ramet:http_responses_total{endpoint="other",method="POST",model_name="tiny",status_code="404"} 1.0',
        'ramet:max_total_num_tokens{model_name="tiny"} 2048.0',
    ):
        assert line in text
    counts = {
        name: float(re.search(rf'^ramet:{name}_count\{{model_name="tiny"\}} (\S+)', text, re.MULTILINE)[1])
        for name in (
            "queue_time_seconds",
            "time_per_output_token_seconds",
            "prompt_tokens_histogram",
            "generation_tokens_histogram",
        )  # fmt: skip
    }
    num_finished = counts["generation_tokens_histogram"]
    assert counts["time_per_output_token_seconds"] == num_finished >= 4
    num_aborted = float(
        re.search(r'^ramet:num_aborted_requests_total\{model_name="tiny"\} (\S+)', text, re.MULTILINE)[1]
    )
    assert num_aborted == 2  # who has left
    assert counts["queue_time_seconds"] == counts["prompt_tokens_histogram"] == num_finished + num_aborted
