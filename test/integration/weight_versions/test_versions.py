"""The version of the weights of real servers: in answers, at the bootstrap server, at a metadata server, in clones."""

import json

import httpx
import pytest
import random_models as rm
from ramet.srt.modelexpress.client.client import ModelExpressClient
from ramet.srt.modelexpress.client.publisher import READY
from ramet.srt.modelexpress.records import read_facts
from server_process import Background, ServerProcess, wait_until

PREFIX = "--remote-instance-weight-loader"
SMALL = ("--max-total-tokens", "2048", "--max-running-requests", "4", "--engine-info-bootstrap-port", "0")
PROMPT = rm.random_prompts([40])[0]
NUM_TOKENS = 400
LONG = {"temperature": 0, "max_new_tokens": NUM_TOKENS, "ignore_eos": True}
SHORT = LONG | {"max_new_tokens": 4}
ADMIN = {"Authorization": "Bearer admin"}


@pytest.fixture(autouse=True)
def version_one(server):
    yield
    assert rename(server, "v1").status_code == 200


def rename(server, version, **body):
    body = {"new_version": version, **body}
    return httpx.post(f"{server.url}/update_weight_version", json=body, headers=ADMIN, timeout=60)


def generate(server, params=SHORT):
    body = {"input_ids": PROMPT, "sampling_params": params}
    return httpx.post(f"{server.url}/generate", json=body, timeout=60).json()["meta_info"]


def cached_tokens(server):
    """On each of the two replicas, which take turns."""
    return [generate(server)["cached_tokens"] for _ in range(2)]


def registered(server, rank):
    answer = httpx.get(f"{server.url}/remote_instance_transfer_engine_info", params={"rank": rank}, headers=ADMIN)
    return answer.json()["manifest"]["weight_version"]


def recorded(mx):
    """The versions of the ranks that are READY at the metadata server."""
    with ModelExpressClient(mx.address, environ={}) as client:
        refs = client.list_sources(status=READY)
        return sorted(facts.weight_version for ref in refs if (facts := read_facts(ref.topology)) is not None)


def check_version(server, version):
    assert httpx.get(f"{server.url}/weight_info").json() == {"weight_version": version}
    assert httpx.get(f"{server.url}/model_info").json()["weight_version"] == version
    assert f'weight_version="{version}"}} 1.0' in httpx.get(f"{server.url}/metrics").text
    info = generate(server)
    assert info["weight_version"] == version
    assert info["weight_versions"] == [{"version": version, "start": 0, "end": 4}]


def test_a_version_has_one_name_everywhere(server, mx):
    wait_until(lambda: recorded(mx) == ["v1", "v1"], "the records")
    check_version(server, "v1")
    cached_tokens(server)
    assert min(cached_tokens(server)) > 0
    answer = rename(server, "v2")
    assert answer.json() == {"success": True, "message": "Weight version updated to v2", "new_version": "v2"}
    assert cached_tokens(server) == [0, 0]
    check_version(server, "v2")
    assert [registered(server, rank) for rank in (0, 1)] == ["v2", "v2"]
    wait_until(lambda: recorded(mx) == ["v2", "v2"], "the records")
    fleet = httpx.get(f"{mx.http_url}/fleet.json").json()
    workers = [worker for model in fleet["models"] for one in model["instances"] for worker in one["workers"]]
    assert {worker["weight_version"] for worker in workers if worker["status"] == "READY"} == {"v2"}
    assert len(metrics(server, "weight_version")) == 1


def metrics(server, name):
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return [line for line in lines if line.startswith(f"ramet:{name}{{")]


def test_requests_that_run_are_ended_or_name_both(server):
    for body, reason in (({}, "abort"), ({"abort_all_requests": False}, "length")):
        stream = Background(server.url, input_ids=PROMPT, sampling_params=LONG)
        assert stream.begun.wait(30)
        assert rename(server, f"after {reason}", **body).status_code == 200
        info = json.loads(stream.join()[-2])["meta_info"]
        assert info["finish_reason"]["type"] == reason
    (first, last) = info["weight_versions"]
    assert (first["version"], first["start"]) == ("after abort", 0) and 0 < first["end"] == last["start"]
    assert last == {"version": "after length", "start": first["end"], "end": NUM_TOKENS}
    assert info["weight_version"] == "after length"


def test_openais_answers_name_both(server):
    body = {"prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as stream:
        lines = (line.removeprefix("data: ") for line in stream.iter_lines() if line)
        next(lines)
        assert rename(server, "v2", abort_all_requests=False).status_code == 200
        events = [json.loads(line) for line in lines if line != "[DONE]"]
    metadata = events[-1]["metadata"]
    assert metadata["weight_version"] == "v2"
    assert [span["version"] for span in metadata["weight_versions"][0]] == ["v1", "v2"]


def test_what_is_no_name_is_refused(server):
    for version in ("", "a\n", "x" * 257):
        answer = rename(server, version)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "new_version"
    assert httpx.post(f"{server.url}/update_weight_version", json={"new_version": "v3"}).status_code == 401
    check_version(server, "v1")


def test_a_clone_serves_its_seeds_version_and_keeps_it(model, server, tmp_path):
    assert rename(server, "v5").status_code == 200
    found = ("--load-format", "remote_instance", f"{PREFIX}-fallback", "error", *SMALL)
    by_address = (*found, f"{PREFIX}-seed-instance-ip", server.url.removeprefix("http://"), "--api-key", "admin")
    with ServerProcess(model, tmp_path / "right", *by_address, "--weight-version", "v5", fake=False) as right:
        with ServerProcess(model, tmp_path / "wrong", *by_address, "--weight-version", "v1", fake=False) as wrong:
            assert wrong.wait_exit() == 1
            assert "its weight version is v5, not v1" in wrong.output
        right.wait_ready()
        assert rename(server, "v6").status_code == 200
        assert weight_version(right) == "v5"


def weight_version(server: ServerProcess) -> str:
    return httpx.get(f"{server.url}/weight_info", headers=ADMIN).json()["weight_version"]
