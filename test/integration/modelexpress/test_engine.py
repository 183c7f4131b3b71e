"""Whole instances find each other through a metadata server: every replica is started with the same command."""

import asyncio
import contextlib
import itertools
import json
import os
import signal
import socket
import time

import httpx
import pytest
from browser import open_browser
from doomed_modelexpress_server import DoomedServer
from lora_adapters import make_adapter
from modelexpress_harness import free_port, running_server, wait_until
from prometheus_process import autoscaler_query, dashboard_queries, running_prometheus
from ramet import Engine
from ramet.srt.modelexpress.client.client import ModelExpressClient, ModelExpressError
from ramet.srt.modelexpress.client.publisher import READY, STALE
from random_models import write_tokenizer
from seed_server import write_random_model
from server_process import MODEL_NAME, PYTHON_FOLDER, ServerProcess

PREFIX = "--remote-instance-weight-loader"
SMALL = ["--engine-info-bootstrap-port", "0", "--max-total-tokens", "256", "--device", "cpu"]
PARAMS = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
QUESTION = {"text": "The quick brown", "sampling_params": PARAMS}
QUICKLY_S = 25.0  # far above the seconds that it takes, far below any wait for a server that has gone


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = write_random_model(tmp_path_factory.mktemp("model"), "llama2")
    write_tokenizer(folder)
    return folder


class Fleet:
    """Instances of one model, which end with it."""

    def __init__(self, folder, model, stack):
        self.folder = folder
        self.model = model
        self.stack = stack
        self.numbers = itertools.count()

    def start(self, config, *flags, backend=True, **environment):
        """Start an instance; it may be asked for before it is ready."""
        if backend:
            flags = ("--load-format", "remote_instance", f"{PREFIX}-backend", "modelexpress", *flags)
        flags = (*SMALL, "--modelexpress-config", json.dumps(config), *flags)
        log = self.folder / f"instance{next(self.numbers)}.log"
        environment = {"MX_HEARTBEAT_INTERVAL_SECS": "1"} | environment
        server = ServerProcess(self.model, log, *flags, fake=False, **environment)
        self.stack.callback(server.kill)  # how instances end in good order has tests of its own
        return server


@pytest.fixture
def fleet(tmp_path, model):
    with contextlib.ExitStack() as stack:
        yield Fleet(tmp_path, model, stack)


@pytest.fixture(scope="module")
def mx():
    with running_server() as server:
        yield server


@pytest.fixture(scope="module")
def replicas(tmp_path_factory, model, mx):
    """Three that were started at once, with the same command, and go on living."""
    with contextlib.ExitStack() as stack:
        fleet = Fleet(tmp_path_factory.mktemp("replicas"), model, stack)
        servers = [fleet.start({"url": mx.address}, MX_HEARTBEAT_INTERVAL_SECS="") for _ in range(3)]
        for server in servers:
            server.wait_ready()
        wait_until(lambda: [status(mx, server) for server in servers] == [["READY"]] * 3, what="all being READY")
        yield servers


def load_report(server, rank=0, key=""):
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.get(f"{server.url}/get_server_info", headers=headers).json()["ranks"][rank]["load_report"]


def answer(server):
    return httpx.post(f"{server.url}/generate", json=QUESTION, timeout=30).json()["text"]


def workers(mx):
    """By the instance's URL: its workers."""
    fleet = httpx.get(f"{mx.http_url}/fleet.json").json()
    return {i["name"]: i["workers"] for model in fleet["models"] for i in model["instances"]}


def status(mx, server):
    return [worker["status"] for worker in workers(mx).get(server.url, [])]


def taken_from(mx, server):
    """URLs of the instances that gave their weights, once the record says so."""
    wait_until(lambda: status(mx, server) == ["READY"], what="READY")
    return [giver["instance"] for giver in workers(mx)[server.url][0]["taking"]["taken_from"]]


def metric(server, name):
    for line in httpx.get(f"{server.url}/metrics").text.splitlines():
        if line.startswith(f"ramet:modelexpress_{name}{{"):
            return float(line.split()[-1])
    return None


def listed(address, status=READY):
    """Rows of that status; None while the server is away."""
    with ModelExpressClient(address, environ={}, timeout_s=2) as client, contextlib.suppress(ModelExpressError):
        return client.list_sources(status=status)
    return None


def test_of_replicas_started_at_once_one_reads_the_files(mx, replicas):
    """Three, since they share two cores; the claim's own tests and benchmark/bench_replicas.py have more."""
    reports = [load_report(server) for server in replicas]
    assert sorted(report["source"] for report in reports) == ["checkpoint", "local_map", "local_map"]
    assert not any(report["fallback_reason"] for report in reports)
    (reader,) = [server for server in replicas if load_report(server)["source"] == "checkpoint"]
    assert taken_from(mx, reader) == []
    for server in replicas:
        if server is not reader:
            assert load_report(server)["verified"]
            assert set(taken_from(mx, server)) < {other.url for other in replicas} - {server.url}
        assert answer(server) == answer(reader)
        wait_until(lambda server=server: metric(server, "ready") == 1, what="the publisher being told READY")
        assert metric(server, "failures") == 0
        assert workers(mx)[server.url][0]["load"] is not None
    claims = f"{mx.http_url}/fleet.json"
    wait_until(lambda: httpx.get(claims).json()["claims"] == [], what="the claim being given back")


def test_defect_12_no_instance_is_ready_before_it_is_healthy_or_after_it_was_told_to_end(fleet, mx, replicas):
    server = fleet.start({"url": mx.address}, "--drain-timeout", "20", f"{PREFIX}-local-mode", "off")
    wait_until(lambda: status(mx, server) == ["READY"] or server.process.poll() is not None, 60, "READY")
    assert server.status(f"{server.url}/health") == 200
    assert load_report(server)["source"] == "transfer_engine" and load_report(server)["verified"]
    assert answer(server) == answer(replicas[0])
    with httpx.stream("POST", f"{server.url}/generate", timeout=60, json={
        "input_ids": [5] * 10, "stream": True, "sampling_params": {"max_new_tokens": 200, "ignore_eos": True},
    }) as stream:  # fmt: skip
        lines = stream.iter_lines()
        next(lines)
        server.signal(signal.SIGTERM)
        wait_until(lambda: status(mx, server) == ["STALE"], what="the record being STALE")
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert server.wait_exit() == 0
    assert status(mx, server) == ["STALE"]


def test_a_forced_seed_never_takes_weights(fleet, mx, replicas):
    server = fleet.start({"url": mx.address, "source": True}).wait_ready()
    assert load_report(server)["source"] == "checkpoint" and taken_from(mx, server) == []


def test_other_revisions_and_models_are_not_taken(fleet, mx, replicas):
    other = fleet.start({"url": mx.address}, "--revision", "b" * 40)
    named = fleet.start({"url": mx.address, "model_name": "another"})
    for server in (other, named):
        report = load_report(server.wait_ready())
        assert report["source"] == "checkpoint" and not report["fallback_reason"]
    wait_until(lambda: status(mx, other) == ["READY"], what="READY")
    same = fleet.start({"url": mx.address}, "--revision", "b" * 40).wait_ready()
    assert taken_from(mx, same) == [other.url]


def test_every_query_of_the_dashboard_finds_something(mx, replicas, tmp_path):
    """And so does the autoscaler's, as Prometheus itself understands them, in what these servers say."""
    targets = [url.removeprefix("http://") for url in (mx.http_url, *(server.url for server in replicas))]
    queries = dashboard_queries() | {autoscaler_query()}
    with running_prometheus(tmp_path, targets) as prometheus:

        def missing():
            for server in replicas:
                assert httpx.post(f"{server.url}/generate", json=QUESTION | {"stream": True}, timeout=30).is_success
                assert httpx.post(f"{server.url}/generate", json={"text": 1}).status_code == 400
            return [query for query in sorted(queries) if not prometheus.find(query)]

        deadline = time.monotonic() + 40
        while found_nothing := missing():
            assert time.monotonic() < deadline, "\n".join(found_nothing)
        assert prometheus.find("ramet:no_such_metric") == []
        (queue_s,) = prometheus.find(autoscaler_query())
        assert 0 <= queue_s < 5
        assert prometheus.find("ramet:queue_oldest_seconds") == [0, 0, 0]  # half of that query


async def test_the_fleet_page_shows_who_lives_who_stands_still_and_who_died(mx, replicas, tmp_path):
    """The last of those that use these replicas: one goes on, one is stopped, one is killed."""
    living, stopped, killed = replicas
    names = [server.url.removeprefix("http://") for server in replicas]
    shown = """[...document.querySelectorAll('tbody')].map((body) =>
        [body.querySelector('.name').innerText, body.querySelector('.status').className.split(' ')[1]])"""
    async with open_browser(tmp_path / "profile") as tab:
        await tab.open(mx.http_url + "/")
        await tab.wait_for("document.querySelectorAll('tbody .READY').length >= 3")
        stopped.signal(signal.SIGSTOP)
        killed.process.kill()
        start, ages, statuses = time.monotonic(), [], []
        while statuses != ["READY", "SILENT", "SILENT"]:
            assert time.monotonic() - start < 15, statuses
            ages.append(workers(mx)[living.url][0]["age_s"])
            await asyncio.sleep(0.2)
            found = dict(await tab.evaluate(shown))
            statuses = [found.get(name) for name in names]
        assert max(ages) < 5
        words = "[...byId('totals').children].map((one) => [...one.children].map((part) => part.innerText))"
        totals = dict(await tab.evaluate(words))
        assert int(totals["instances"]) == len([one for one in found.values() if one != "SILENT"])
        assert int(totals["silent"]) == len([one for one in found.values() if one == "SILENT"]) >= 2
        text = await tab.text()
        assert "shared memory" in text and f"host {socket.gethostname()}" in text
        for width in (1280, 390):
            await tab.set_width(width)
            assert await tab.too_wide() == []
        links = await tab.evaluate("[...document.querySelectorAll('tbody a')].map((link) => link.href)")
        assert f"{living.url}/metrics" in links and httpx.get(f"{living.url}/metrics").status_code == 200
        assert await tab.evaluate("document.querySelectorAll('.bars li').length") > 0
        assert tab.problems == []
    stopped.signal(signal.SIGCONT)
    wait_until(lambda: status(mx, stopped) == ["READY"], what="READY again")


def test_defect_11_a_source_that_was_killed_is_got_past_in_seconds(fleet):
    with running_server() as own:
        first = fleet.start({"url": own.address}).wait_ready()
        wait_until(lambda: status(own, first) == ["READY"], what="READY")
        first.kill()
        assert status(own, first) == ["READY"]
        start = time.monotonic()
        second = fleet.start({"url": own.address}).wait_ready()
        report = load_report(second)
        assert report["source"] == "checkpoint" and "it is not there" in report["fallback_reason"]
        assert first.url.removeprefix("http://") in report["fallback_reason"]
        assert "no weights from the source" in second.output
        assert time.monotonic() - start < 20  # the start itself takes some seconds


def test_the_server_killed_at_each_step_of_an_instances_life(fleet, tmp_path):
    """By SIGKILL in the middle of a call: before INITIALIZING, before READY, while READY, and at the withdrawal.

    One instance is forced to be a seed; the other one looks for a source first, so the server dies at its claim.
    """
    ports = {"seed": free_port(), "searcher": free_port()}
    urls = {name: f"127.0.0.1:{port}" for name, port in ports.items()}
    with (
        DoomedServer(ports["seed"], tmp_path, "UpdateStatus", "READY") as before_ready,
        DoomedServer(ports["searcher"], tmp_path, "PublishMetadata") as at_claim,
    ):
        for name in ports:
            wait_until(lambda name=name: listed(urls[name]) is not None, what="the metadata server")
        often = {"MX_HEARTBEAT_INTERVAL_SECS": "0.2"}
        seed = fleet.start({"url": urls["seed"], "source": True}, backend=False, **often)
        searcher = fleet.start({"url": urls["searcher"]}, **often)
        before_ready.wait_killed()
        at_claim.wait_killed()
    assert load_report(seed.wait_ready())["source"] == "checkpoint"
    assert metric(seed, "publishes") == 1 and metric(seed, "ready") == 0
    text = answer(seed)
    for doom in (("PublishMetadata",), ("UpdateStatus", "READY", 3)):
        with DoomedServer(ports["seed"], tmp_path, *doom) as server:
            server.wait_killed()
        failures = metric(seed, "failures")
        assert answer(seed) == text and seed.status(f"{seed.url}/health") == 200
        wait_until(lambda failures=failures: metric(seed, "failures") > failures, what="a failure that is counted")
    with DoomedServer(ports["seed"], tmp_path, "UpdateStatus", "STALE") as server:
        wait_until(lambda: listed(urls["seed"]), 40, "the record being READY once more")
        start = time.monotonic()
        seed.signal(signal.SIGTERM)
        server.wait_killed()
        assert seed.wait_exit() == 0 and time.monotonic() - start < QUICKLY_S
    report = load_report(searcher.wait_ready())
    assert report["source"] == "checkpoint"
    assert "UNAVAILABLE" in report["fallback_reason"] and urls["searcher"] in report["fallback_reason"]
    assert metric(searcher, "ready") == 0 and answer(searcher) == text
    with running_server(port=ports["searcher"]) as back:
        wait_until(lambda: status(back, searcher) == ["READY"], 40, "the record at the server that came back")
    start = time.monotonic()
    searcher.signal(signal.SIGTERM)
    assert searcher.wait_exit() == 0 and time.monotonic() - start < QUICKLY_S


def test_an_engine_without_http_gives_its_weights(fleet, model, monkeypatch):
    """Its record has no URL to ask at, so the client goes by the record itself, and cannot compare checksums."""
    monkeypatch.setenv("PYTHONPATH", str(PYTHON_FOLDER))
    with running_server() as own, ModelExpressClient(own.address, environ={}) as client:
        fields = {"served_model_name": MODEL_NAME, "engine_info_bootstrap_port": 0, "max_total_tokens": 256}
        config = json.dumps({"url": own.address, "source": True})
        with Engine(model_path=str(model), device="cpu", modelexpress_config=config, **fields) as engine:
            (ref,) = wait_until(lambda: listed(own.address), what="READY")
            record = client.get_metadata(ref.mx_source_id, ref.worker_id).worker
            assert record.metadata_endpoint == "" and record.transfer_engine_session_id
            assert "http" not in record.topology["ramet"]
            server = fleet.start({"url": own.address}, f"{PREFIX}-fallback", "error").wait_ready()
            report = load_report(server)
            assert report["source"] == "transfer_engine" and not report["verified"]
            assert report["taken_from"] == [ref.worker_id]
            assert answer(server) == engine.generate(QUESTION["text"], PARAMS)["text"]
        assert [row.worker_id for row in listed(own.address, STALE)] == [ref.worker_id]


def test_every_rank_is_found_and_other_topologies_too(fleet):
    with running_server() as own:
        config = {"url": own.address}
        first = fleet.start(config, "--tp-size", "2").wait_ready()
        wait_until(lambda: status(own, first) == ["READY"] * 2, what="both ranks being READY")
        single = fleet.start(config)
        second = fleet.start(config, "--tp-size", "2")
        report = load_report(single.wait_ready())
        assert report["source"] == "local_copy" and report["verified"]
        assert len(report["taken_from"]) == 2
        reports = [load_report(second.wait_ready(), rank) for rank in range(2)]
        assert [report["source"] for report in reports] == ["local_map"] * 2
        assert reports[0]["taken_from"] != reports[1]["taken_from"]
        assert answer(single) == answer(first) == answer(second)
        first.signal(signal.SIGTERM)
        assert first.wait_exit() == 0
        assert status(own, first) == ["STALE"] * 2


def test_the_adapters_of_the_instance_that_gives_its_weights(fleet, model, tmp_path):
    """By themselves, as with seeds by address; only those who may know the key get them, and it is shown to nobody."""
    adapter = make_adapter(tmp_path / "one", model, seed=1)
    keys = ("--enable-lora", "--api-key", "user", "--admin-api-key", "boss")
    with running_server() as own:
        first = fleet.start({"url": own.address}, *keys, "--lora-paths", f"one={adapter}").wait_ready()
        wait_until(lambda: status(own, first) == ["READY"], what="READY")
        second = fleet.start({"url": own.address}, *keys, f"{PREFIX}-fallback", "error").wait_ready()
        assert load_report(second, key="boss")["instances"] == [first.url]
        question = QUESTION | {"lora_path": "one"}
        headers = {"Authorization": "Bearer user"}
        answers = [
            httpx.post(f"{server.url}/generate", json=question, headers=headers).json() for server in (first, second)
        ]
        assert answers[0]["output_ids"] == answers[1]["output_ids"]
        assert answers[1]["meta_info"]["lora_name"] == "one" and "loaded the adapter one from" in second.output


def test_defect_14_who_has_no_token_neither_publishes_nor_looks(fleet, tmp_path):
    tokens = tmp_path / "tokens"
    tokens.write_text("secret\n")
    with running_server(auth_token_file=str(tokens)) as own:
        stranger = fleet.start({"url": own.address})
        member = fleet.start({"url": own.address}, MX_AUTH_TOKEN_PATH=str(tokens))
        assert "UNAUTHENTICATED" in load_report(stranger.wait_ready())["fallback_reason"]
        assert load_report(member.wait_ready())["source"] == "checkpoint"
        wait_until(lambda: metric(member, "ready") == 1, what="the member's record being READY")
        assert metric(stranger, "ready") == 0 and metric(stranger, "failures") > 0


def test_defect_10_a_start_without_weights_is_an_error_that_says_why(fleet):
    with running_server() as own:
        server = fleet.start({"url": own.address, "wait_timeout": 1}, f"{PREFIX}-fallback", "error")
        assert server.wait_exit() == 1
        assert "no source became ready within" in server.output


def test_the_old_paths_need_no_grpc(fleet, tmp_path):
    for name in ("grpc", "google"):
        (tmp_path / "blocked" / name).mkdir(parents=True)
        (tmp_path / "blocked" / name / "__init__.py").write_text("raise ImportError('not installed here')\n")
    path = os.pathsep.join(map(str, (tmp_path / "blocked", PYTHON_FOLDER)))
    express = fleet.start({"url": "localhost:1"}, PYTHONPATH=path)
    log = tmp_path / "seed.log"
    flags = [*SMALL, f"{PREFIX}-start-seed-via-transfer-engine"]
    with ServerProcess(fleet.model, log, *flags, fake=False, PYTHONPATH=path) as seed:
        address = seed.wait_ready().url.removeprefix("http://")
        flags = [*SMALL, "--load-format", "remote_instance", f"{PREFIX}-seed-instance-ip", address]
        with ServerProcess(fleet.model, tmp_path / "client.log", *flags, fake=False, PYTHONPATH=path) as client:
            assert load_report(client.wait_ready())["source"] == "local_map"
    assert express.wait_exit() == 1
    assert "install ramet[modelexpress]" in express.output
