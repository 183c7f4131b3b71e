"""guidellm and aiperf: each kind of request that they can make of such a server, and that all of them are counted."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from clients.client_run import kept_file, run_program
from clients.environments import python_of
from clients.wire_tap import WireTap
from server_process import MODEL_NAME, ServerProcess

NUM_REQUESTS = 6
OUTPUT_LEN = 12
GUIDELLM_RUNS = {
    "chats, concurrent": ("/v1/chat/completions", "kind=concurrent,streams=2", ""),
    "completions, concurrent": ("/v1/completions", "kind=concurrent,streams=2", ""),
    "completions, one by one": ("/v1/completions", "kind=synchronous", ""),
    "chats, at a rate, whole": ("/v1/chat/completions", "kind=constant,rate=20", ",stream=false"),
    "responses, concurrent": ("/v1/responses", "kind=concurrent,streams=2", ""),
}
AIPERF_RUNS = {
    "chats": ("chat", "--streaming"),
    "chats, whole": ("chat",),
    "completions": ("completions", "--streaming"),
    "responses": ("responses", "--streaming"),
    "messages": ("messages", "--streaming"),
    "chats of several turns": (
        "chat",
        "--streaming",
        "--conversation-turn-mean",
        "2",
        "--conversation-turn-stddev",
        "0",
    ),
}


@pytest.mark.parametrize("run", GUIDELLM_RUNS)
def test_guidellm(run: str, server: ServerProcess, model: Path, record_property: Callable[..., None]) -> None:
    record_property("client", "guidellm")
    record_property("step", run)
    route, profile, options = GUIDELLM_RUNS[run]
    name = f"guidellm_{run.replace(', ', '_').replace(' ', '_')}"
    output = kept_file(f"{name}.json")
    output.unlink(missing_ok=True)
    tap = WireTap(server.url, kept_file(f"{name}.wire.jsonl"))
    command = [
        python_of("guidellm").parent / "guidellm", "run",
        "--backend", f"kind=openai_http,target={tap.url},model={MODEL_NAME},request_format={route}{options}",
        "--profile", profile, "--constraint", f"kind=max_requests,count={NUM_REQUESTS}",
        "--data", f"kind=synthetic_text,prompt_tokens=32,output_tokens={OUTPUT_LEN}",
        "--tokenizer", f"kind=hf_auto,model={model}", "--output", f"kind=json,path={output}", "--disable-console",
    ]  # fmt: skip
    try:
        result = run_program(command, name, 200)
    finally:
        tap.close()
    assert output.exists(), (result.stdout + result.stderr)[-2000:]
    metrics = json.loads(output.read_text())["benchmarks"][0]["metrics"]
    assert metrics["request_totals"] == {
        "successful": NUM_REQUESTS, "errored": 0, "incomplete": 0, "total": NUM_REQUESTS,
    }  # fmt: skip
    assert metrics["output_token_count"]["successful"]["total_sum"] == NUM_REQUESTS * OUTPUT_LEN


@pytest.mark.parametrize("run", AIPERF_RUNS)
def test_aiperf(run: str, server: ServerProcess, model: Path, record_property: Callable[..., None]) -> None:
    record_property("client", "aiperf")
    record_property("step", run)
    endpoint, *flags = AIPERF_RUNS[run]
    name = f"aiperf_{run.replace(', ', '_').replace(' ', '_')}"
    output = kept_file(name)
    shutil.rmtree(output, ignore_errors=True)
    tap = WireTap(server.url, kept_file(f"{name}.wire.jsonl"))
    command = [
        python_of("aiperf").parent / "aiperf", "profile", "--model", MODEL_NAME, "--url", tap.url,
        "--endpoint-type", endpoint, "--tokenizer", model, "--isl", "32", "--osl", OUTPUT_LEN, "--concurrency", "2",
        "--request-count", NUM_REQUESTS, "--ui", "none", "--artifact-dir", output, *flags,
    ]  # fmt: skip
    try:
        # Its offline mode takes no folders as tokenizers; a folder it doesn't look for elsewhere.
        result = run_program(command, name, 200, HF_HUB_OFFLINE="")
    finally:
        tap.close()
    found = output / "profile_export_aiperf.json"
    assert found.exists(), (result.stdout + result.stderr)[-2000:]
    record = json.loads(found.read_text())
    assert record["error_summary"] == []
    assert record["request_count"]["avg"] == NUM_REQUESTS
    assert 0 < record["total_osl"]["avg"] <= NUM_REQUESTS * (OUTPUT_LEN + 1)
    assert ("time_to_first_token" in record) == ("--streaming" in flags)
