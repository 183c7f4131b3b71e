"""What comes of a process that stands still: /health says it, callers get an error, and a line names it at the end."""

import json
import os
import signal
import time
from pathlib import Path

import httpx
import pytest
from cluster import Case, Cluster, Network
from server_process import (
    Background,
    ServerProcess,
    assert_nothing_left,
    is_running,
    wait_until,
    write_weightless_model,
)

SCHEDULER, DETOKENIZER = "fake_scheduler", "detokenizer_manager"
DEMO_MODEL = Path(__file__).resolve().parents[2] / "examples" / "demo_model"
TIMEOUT_S = 5.0
FLAGS = ("--watchdog-timeout", f"{TIMEOUT_S:g}")
SLACK_S = 4.0  # for a machine that does something else besides


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weightless_model(tmp_path_factory.mktemp("model"))


def error_lines(server: ServerProcess) -> list[str]:
    return [line for line in server.output.splitlines() if line.startswith("ramet: error:")]


@pytest.mark.parametrize(("module", "name"), [(SCHEDULER, "scheduler (rank 0)"), (DETOKENIZER, "detokenizer")])
def test_a_stopped_child_ends_the_server(model: Path, tmp_path: Path, module: str, name: str) -> None:
    with ServerProcess(model, tmp_path / "log", *FLAGS, FAKE_STEP_S="0.05") as server:
        url, children = server.wait_ready().url, server.children()
        request = Background(url, sampling_params={"max_new_tokens": 400})
        assert request.begun.wait(20)
        child = server.child(module)
        os.kill(child, signal.SIGSTOP)
        started = time.monotonic()
        wait_until(lambda: server.status(f"{url}/health") == 503, "the doubt", TIMEOUT_S)
        said = httpx.get(f"{url}/health").json()["error"]["message"]
        assert f"the {name}, process {child} on node 0, has not moved" in said and "stopped by a signal" in said
        assert server.wait_exit(30) == 1
        assert time.monotonic() - started < TIMEOUT_S + SLACK_S
        lines = request.join()
    assert lines[-1] == "[DONE]" and "has not moved" in json.loads(lines[-2])["error"]["message"]
    (line,) = error_lines(server)
    assert f"the {name}, process {child} on node 0, has not moved" in line
    assert "Traceback" not in server.output
    assert_nothing_left(server, children)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("hang_at_token", "has been at one forward pass, or another task, for"),
        ("hold_lock_at_token", "has not moved for"),
    ],
)
def test_a_pass_without_an_end_ends_the_server(model: Path, tmp_path: Path, fault: str, words: str) -> None:
    with ServerProcess(model, tmp_path / "log", "--watchdog-timeout", "3", FAKE_FAULT=fault) as server:
        answer = httpx.post(f"{server.wait_ready().url}/generate", json={"text": "a"}, timeout=60)
        assert answer.status_code == 503 and words in answer.json()["error"]["message"]
        assert server.wait_exit(10) == 1
    assert "the scheduler (rank 0)" in error_lines(server)[0] and words in error_lines(server)[0]


def test_a_child_that_is_stopped_while_starting_ends_the_server(model: Path, tmp_path: Path) -> None:
    with ServerProcess(model, tmp_path / "log", *FLAGS, FAKE_FAULT="hang_at_start") as server:
        wait_until(lambda: server.status(f"{server.url}/health") == 503, "an answer while loading")
        os.kill(server.child(SCHEDULER), signal.SIGSTOP)
        assert server.wait_exit(TIMEOUT_S + SLACK_S) == 1
    assert "the scheduler (rank 0)" in error_lines(server)[0] and "has not moved" in error_lines(server)[0]
    assert server.leftovers() == []


def test_a_stopped_main_process_is_killed_by_its_children(model: Path, tmp_path: Path) -> None:
    with ServerProcess(model, tmp_path / "log", *FLAGS) as server:
        url, children = server.wait_ready().url, server.children()
        server.signal(signal.SIGSTOP)
        with pytest.raises(httpx.HTTPError):  # the connection is cut, long before the client gives up
            httpx.get(f"{url}/health", timeout=60)
        assert server.wait_exit(TIMEOUT_S + SLACK_S) == -signal.SIGKILL
        wait_until(lambda: not any(is_running(child) for child in children), "the children's end", 10)
        wait_until(lambda: server.leftovers() == [], "the end of its sockets", 10)
    assert f"the main process, process {server.process.pid} on node 0, has not moved" in server.output


def test_a_short_stop_is_forgiven(model: Path, tmp_path: Path) -> None:
    with ServerProcess(model, tmp_path / "log", "--watchdog-timeout", "16") as server:
        url = server.wait_ready().url
        for pid in (server.child(SCHEDULER), server.child(DETOKENIZER)):
            os.kill(pid, signal.SIGSTOP)
            wait_until(lambda: server.status(f"{url}/health") == 503, "the doubt", 20)
            os.kill(pid, signal.SIGCONT)
            wait_until(lambda: server.status(f"{url}/health") == 200, "the end of the doubt", 10)
        assert "all processes move again" in server.output
        assert httpx.post(f"{url}/generate", json={"text": "a"}).status_code == 200
        server.signal()
        assert server.wait_exit(10) == 0


@pytest.mark.slow
def test_the_rank_that_stands_still_is_named_and_not_those_that_wait_for_it(tmp_path: Path) -> None:
    flags = ("--tp-size", "2", "--device", "cpu", *FLAGS)
    with ServerProcess(DEMO_MODEL, tmp_path / "log", *flags, fake=False) as server:
        url, children = server.wait_ready().url, server.children()
        first = server.child("scheduler_process")
        rank_1 = next(pid for pid in sorted(children) if pid > first and pid != server.child(DETOKENIZER))
        request = Background(url, sampling_params={"max_new_tokens": 900, "ignore_eos": True})
        assert request.begun.wait(60)
        os.kill(rank_1, signal.SIGSTOP)
        assert server.wait_exit(TIMEOUT_S + 2 * SLACK_S) == 1
        assert "has not moved" in json.loads(request.join()[-2])["error"]["message"]
    (line,) = error_lines(server)
    assert f"the scheduler (rank 1), process {rank_1} on node 0, has not moved" in line
    assert "Traceback" not in server.output
    assert_nothing_left(server, children)


@pytest.mark.slow
def test_node_0_names_the_process_of_another_node(tmp_path: Path) -> None:
    """Node 1 has two ranks; the one that does not beat for its node is stopped."""
    case = Case(nnodes=2, tp_size=4)
    flags = ("--device", "cpu", "--watchdog-timeout", "8")
    with Network(2) as network, Cluster(case, network.hosts, DEMO_MODEL, tmp_path, *flags) as cluster:
        head, other = cluster.wait_ready().nodes
        everyone = [pid for node in cluster.nodes for pid in node.descendants()]
        stopped = max(pid for pid in other.descendants() if b"scheduler" in Path(f"/proc/{pid}/cmdline").read_bytes())
        os.kill(stopped, signal.SIGSTOP)
        line = f"the scheduler (rank 3), process {stopped} on node 1, has not moved"
        wait_until(lambda: head.request("/health")[0] == 503, "node 0's doubt", 15)
        assert line in str(head.request("/health")[1])
        assert head.process.wait(30) == 1 and other.process.wait(30) == 1
        wait_until(lambda: not any(is_running(pid) for pid in everyone), "the end of all processes", 10)
    for node in cluster.nodes:
        (error,) = [text for text in node.output.splitlines() if text.startswith("ramet: error:")]
        assert line in error
        assert "Traceback" not in node.output
