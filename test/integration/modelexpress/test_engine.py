"""Whole instances find each other through a metadata server: every replica is started with the same command."""

import contextlib
import json
import os
import signal
import time

import httpx
import pytest
import random_models as rm
from modelexpress_harness import free_port, running_server, wait_until
from server_process import PYTHON_FOLDER, ServerProcess

WAIT_S = 60.0
PREFIX = "--remote-instance-weight-loader"
SMALL = ["--engine-info-bootstrap-port", "0", "--max-total-tokens", "256", "--device", "cpu"]
QUESTION = {"text": "The quick brown", "sampling_params": {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return rm.make_model(tmp_path_factory.mktemp("model"), "llama2")


@pytest.fixture
def fleet(tmp_path, model):
    with contextlib.ExitStack() as stack:
        yield FleetUnderTest(tmp_path, model, stack)


class FleetUnderTest:
    """Instances of one model, ended with the test."""

    def __init__(self, folder, model, stack):
        self.folder = folder
        self.model = model
        self.stack = stack
        self.count = 0

    def start(self, config, *flags, backend=True, model=None, **environment):
        self.count += 1
        if backend:
            flags = ("--load-format", "remote_instance", f"{PREFIX}-backend", "modelexpress", *flags)
        flags = (*SMALL, "--modelexpress-config", json.dumps(config), *flags)
        log = self.folder / f"instance{self.count}.log"
        environment = {"MX_HEARTBEAT_INTERVAL_SECS": "1"} | environment
        server = ServerProcess(model or self.model, log, *flags, fake=False, **environment)
        self.stack.callback(kill, server)  # how instances end in good order has tests of its own
        return server


def load_report(server, rank=0):
    return httpx.get(f"{server.url}/get_server_info").json()["ranks"][rank]["load_report"]


def answer(server):
    return httpx.post(f"{server.url}/generate", json=QUESTION, timeout=30).json()["text"]


def workers(mx):
    """By the instance's URL: its workers."""
    fleet = httpx.get(f"{mx.http_url}/fleet.json").json()
    return {i["name"]: i["workers"] for model in fleet["models"] for i in model["instances"]}


def status(mx, server):
    return [worker["status"] for worker in workers(mx).get(server.url, [])]


def kill(server):
    """End an instance as a power cut does."""
    if server.process.poll() is not None:
        return
    children = server.children()
    server.signal(signal.SIGKILL)
    server.wait_exit()
    wait_until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in children), what="the children's end")


def metric(server, name):
    for line in httpx.get(f"{server.url}/metrics").text.splitlines():
        if line.startswith(f"ramet:modelexpress_{name}{{"):
            return float(line.split()[-1])
    return None


def test_the_same_command_for_every_replica(fleet):
    with running_server() as mx:
        config = {"url": mx.address}
        first = fleet.start(config).wait_ready()
        assert load_report(first)["source"] == "checkpoint" and not load_report(first)["fallback_reason"]
        wait_until(lambda: status(mx, first) == ["READY"], what="the first instance's record being READY")
        second = fleet.start(config).wait_ready()
        third = fleet.start(config, f"{PREFIX}-local-mode", "off").wait_ready()
        assert load_report(second)["source"] == "local_map" and load_report(second)["verified"]
        assert load_report(third)["source"] == "transfer_engine" and load_report(third)["verified"]
        assert answer(first) == answer(second) == answer(third)
        wait_until(lambda: status(mx, third) == ["READY"], what="the third instance's record being READY")
        shown = workers(mx)
        assert shown[first.url][0]["taking"]["taken_from"] == []
        assert shown[second.url][0]["taking"]["taken_from"][0]["instance"] == first.url
        assert shown[third.url][0]["taking"]["taken_from"][0]["instance"] in (first.url, second.url)
        assert metric(second, "ready") == 1 and metric(second, "failures") == 0
        assert shown[second.url][0]["load"] is not None


def test_defect_12_no_instance_is_ready_before_it_is_healthy_or_after_it_was_told_to_end(fleet):
    with running_server() as mx:
        server = fleet.start({"url": mx.address}, "--drain-timeout", "20")
        while status(mx, server) != ["READY"]:
            assert server.process.poll() is None, server.output
            time.sleep(0.005)
        assert server.status(f"{server.url}/health") == 200
        with httpx.stream("POST", f"{server.url}/generate", timeout=60, json={
            "input_ids": [5] * 10, "stream": True, "sampling_params": {"max_new_tokens": 200, "ignore_eos": True},
        }) as stream:  # fmt: skip
            lines = stream.iter_lines()
            next(lines)
            server.signal(signal.SIGTERM)
            wait_until(lambda: status(mx, server) == ["STALE"], what="the record being STALE")
            for _ in lines:
                pass
        assert server.wait_exit() == 0
        assert status(mx, server) == ["STALE"]


def test_defect_11_a_source_that_was_killed_is_got_past_in_seconds(fleet):
    with running_server() as mx:
        config = {"url": mx.address}
        first = fleet.start(config).wait_ready()
        wait_until(lambda: status(mx, first) == ["READY"], what="READY")
        second = fleet.start(config).wait_ready()
        wait_until(lambda: status(mx, second) == ["READY"], what="READY")
        kill(first)
        assert status(mx, first) == ["READY"]
        third = fleet.start(config).wait_ready()
        assert load_report(third)["source"] == "local_map"
        kill(second)
        kill(third)
        start = time.monotonic()
        fourth = fleet.start(config).wait_ready()
        report = load_report(fourth)
        assert report["source"] == "checkpoint" and "it is not there" in report["fallback_reason"]
        for server in (first, second, third):
            assert server.url.removeprefix("http://") in report["fallback_reason"]
        assert "no weights from the source" in fourth.output
        assert time.monotonic() - start < 20  # the start itself takes some seconds


def test_a_server_that_is_away_at_the_start_and_later_does_not_hurt(fleet):
    port = free_port()
    config = {"url": f"127.0.0.1:{port}"}
    first = fleet.start(config).wait_ready()
    report = load_report(first)
    assert report["source"] == "checkpoint"
    assert "UNAVAILABLE" in report["fallback_reason"] and str(port) in report["fallback_reason"]
    assert metric(first, "ready") == 0 and metric(first, "failures") > 0
    assert answer(first)
    for round in range(2):
        with running_server(port=port) as mx:
            wait_until(lambda mx=mx: status(mx, first) == ["READY"], 40, "the record being there again")
            if round == 1:
                second = fleet.start(config).wait_ready()
                assert load_report(second)["source"] == "local_map"
    assert metric(first, "lost_records") >= 1
    assert answer(first) == answer(second)
    start = time.monotonic()
    first.signal(signal.SIGTERM)
    assert first.wait_exit() == 0 and time.monotonic() - start < 15


def test_of_replicas_started_at_once_one_reads_the_files(fleet):
    """Four, since all of them share two cores here; the claim's own tests have more."""
    with running_server() as mx:
        servers = [fleet.start({"url": mx.address}) for _ in range(4)]
        reports = [load_report(server.wait_ready()) for server in servers]
        sources = sorted(report["source"] for report in reports)
        assert sources == ["checkpoint", "local_map", "local_map", "local_map"]
        wait_until(lambda: [status(mx, server) for server in servers] == [["READY"]] * 4, what="all being READY")
        assert httpx.get(f"{mx.http_url}/fleet.json").json()["claims"] == []


def test_a_forced_seed_never_takes_weights(fleet):
    with running_server() as mx:
        config = {"url": mx.address, "source": True}
        for backend in (False, True):
            server = fleet.start(config, backend=backend).wait_ready()
            assert load_report(server)["source"] == "checkpoint"
            wait_until(lambda server=server: status(mx, server) == ["READY"], what="READY")


def test_the_embedded_server_serves_the_machine(fleet):
    while True:
        port = free_port()
        if port < 65000:
            break
    config = {"url": f"embedded:{port}"}
    first = fleet.start(config, backend=False).wait_ready()
    assert load_report(first)["source"] == "checkpoint"
    second = fleet.start(config).wait_ready()
    assert load_report(second)["source"] == "local_map"
    assert f"using the ModelExpress server at 127.0.0.1:{port}" in second.output
    assert len(httpx.get(f"http://127.0.0.1:{port + 1}/fleet.json").json()["models"][0]["instances"]) == 2
    first.signal(signal.SIGTERM)
    assert first.wait_exit() == 0
    assert answer(second)


def test_other_revisions_and_models_are_not_taken(fleet):
    with running_server() as mx:
        first = fleet.start({"url": mx.address}, "--revision", "a" * 40).wait_ready()
        wait_until(lambda: status(mx, first) == ["READY"], what="READY")
        other = fleet.start({"url": mx.address}, "--revision", "b" * 40).wait_ready()
        named = fleet.start({"url": mx.address, "model_name": "another"}, "--revision", "a" * 40).wait_ready()
        for server in (other, named):
            assert load_report(server)["source"] == "checkpoint" and not load_report(server)["fallback_reason"]
        same = fleet.start({"url": mx.address}, "--revision", "a" * 40).wait_ready()
        assert workers_taken_from(mx, same) == [first.url]


def workers_taken_from(mx, server):
    wait_until(lambda: status(mx, server) == ["READY"], what="READY")
    return [giver["instance"] for giver in workers(mx)[server.url][0]["taking"]["taken_from"]]


def test_every_rank_is_found_and_other_topologies_too(fleet):
    with running_server() as mx:
        config = {"url": mx.address}
        first = fleet.start(config, "--tp-size", "2").wait_ready()
        wait_until(lambda: status(mx, first) == ["READY"] * 2, what="both ranks being READY")
        second = fleet.start(config, "--tp-size", "2").wait_ready()
        reports = [load_report(second, rank) for rank in range(2)]
        assert [report["source"] for report in reports] == ["local_map"] * 2
        assert reports[0]["taken_from"] != reports[1]["taken_from"]
        kill(second)
        single = fleet.start(config).wait_ready()
        report = load_report(single)
        assert report["source"] == "local_copy" and report["verified"]
        assert len(report["taken_from"]) == 2
        assert answer(single) == answer(first)
        first.signal(signal.SIGTERM)
        assert first.wait_exit() == 0
        assert status(mx, first) == ["STALE"] * 2


def test_defect_10_a_start_without_weights_is_an_error_that_says_why(fleet):
    with running_server() as mx:
        config = {"url": mx.address, "wait_timeout": 1}
        server = fleet.start(config, f"{PREFIX}-fallback", "error")
        assert server.wait_exit() == 1
        assert "no source became ready within" in server.output


def test_defect_14_who_has_no_token_neither_publishes_nor_looks(fleet, tmp_path):
    tokens = tmp_path / "tokens"
    tokens.write_text("secret\n")
    with running_server(auth_token_file=str(tokens)) as mx:
        stranger = fleet.start({"url": mx.address}).wait_ready()
        assert "UNAUTHENTICATED" in load_report(stranger)["fallback_reason"]
        member = fleet.start({"url": mx.address}, MX_AUTH_TOKEN_PATH=str(tokens)).wait_ready()
        assert load_report(member)["source"] == "checkpoint"
        assert metric(stranger, "ready") == 0
        wait_until(lambda: metric(member, "ready") == 1, what="the member's record being READY")


def test_the_old_paths_need_no_grpc(fleet, tmp_path):
    for name in ("grpc", "google"):
        (tmp_path / "blocked" / name).mkdir(parents=True)
        (tmp_path / "blocked" / name / "__init__.py").write_text("raise ImportError('not installed here')\n")
    path = os.pathsep.join(map(str, (tmp_path / "blocked", PYTHON_FOLDER)))
    log = tmp_path / "seed.log"
    flags = [*SMALL, f"{PREFIX}-start-seed-via-transfer-engine"]
    with ServerProcess(fleet.model, log, *flags, fake=False, PYTHONPATH=path) as seed:
        address = seed.wait_ready().url.removeprefix("http://")
        flags = [*SMALL, "--load-format", "remote_instance", f"{PREFIX}-seed-instance-ip", address]
        with ServerProcess(fleet.model, tmp_path / "client.log", *flags, fake=False, PYTHONPATH=path) as client:
            assert load_report(client.wait_ready())["source"] == "local_map"
    express = fleet.start({"url": "localhost:1"}, PYTHONPATH=path)
    assert express.wait_exit() == 1
    assert "install ramet[modelexpress]" in express.output
