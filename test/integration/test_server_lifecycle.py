"""How a server starts, stops and breaks: one clear line, the right exit code, and nothing left behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_process import (
    PYTHON_FOLDER,
    Background,
    ServerProcess,
    assert_nothing_left,
    wait_until,
    write_weightless_model,
)

SCHEDULER, DETOKENIZER = "fake_scheduler", "detokenizer_manager"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weightless_model(tmp_path_factory.mktemp("model"))


def assert_fails(server: ServerProcess, words: str) -> None:
    """Exit code 1 within seconds, and one line that says why."""
    with server:
        assert server.wait_exit(20) == 1
    errors = [line for line in server.output.splitlines() if "error:" in line]
    assert len(errors) == 1, server.output
    assert words in errors[0]
    assert "Traceback" not in server.output
    assert server.leftovers() == []


def test_health_is_503_while_loading(model: Path, tmp_path: Path) -> None:
    with ServerProcess(model, tmp_path / "log", FAKE_START_S="6") as server:
        url = server.url
        wait_until(lambda: server.status(f"{url}/health") == 503, "an answer while loading")
        answer = httpx.post(f"{url}/generate", json={"text": "a"})
        assert answer.status_code == 503
        assert "loading" in answer.json()["error"]["message"]
        server.wait_ready()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_lets_running_requests_end(model: Path, tmp_path: Path, number: int) -> None:
    with ServerProcess(model, tmp_path / "log", FAKE_STEP_S="0.02") as server:
        url, children = server.wait_ready().url, server.children()
        request = Background(url, sampling_params={"max_new_tokens": 60})
        assert request.begun.wait(20)
        server.signal(number)
        wait_until(lambda: server.status(f"{url}/health") == 503, "the drain")
        assert httpx.post(f"{url}/generate", json={"text": "a"}).status_code == 503
        lines = request.join()
        assert lines[-1] == "[DONE]"
        assert json.loads(lines[-2])["meta_info"]["completion_tokens"] == 60
        assert server.wait_exit(10) == 0
    assert_nothing_left(server, children)
    assert len(children) == 2


@pytest.mark.parametrize("records", [True, False])
def test_a_profile_that_is_recorded_is_written_before_the_ranks_are_told_to_end(
    model: Path, tmp_path: Path, records: bool
) -> None:
    written = tmp_path / "written"
    flags = ["--profile-dir", str(tmp_path)]
    with ServerProcess(model, tmp_path / "log", *flags, FAKE_PROFILE=str(written)) as server:
        url = server.wait_ready().url
        if records:
            assert httpx.post(f"{url}/start_profile", json={"output_dir": str(tmp_path)}).status_code == 200
        server.signal(signal.SIGTERM)
        assert server.wait_exit(10) == 0
    assert written.exists() == records


def test_drain_timeout_aborts(model: Path, tmp_path: Path) -> None:
    with ServerProcess(model, tmp_path / "log", "--drain-timeout", "0.5", FAKE_STEP_S="0.1") as server:
        request = Background(server.wait_ready().url, sampling_params={"max_new_tokens": 400})
        assert request.begun.wait(20)
        server.signal()
        lines = request.join()
        assert json.loads(lines[-2])["meta_info"]["finish_reason"]["type"] == "abort"
        assert server.wait_exit(10) == 0


def test_second_signal_ends_at_once(model: Path, tmp_path: Path) -> None:
    with ServerProcess(model, tmp_path / "log", FAKE_STEP_S="0.1") as server:
        url, children = server.wait_ready().url, server.children()
        with httpx.stream("POST", f"{url}/generate", json={"input_ids": [5], "stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            server.signal()
            wait_until(lambda: server.status(f"{url}/health") == 503, "the drain")
            started = time.monotonic()
            server.signal()
            assert server.wait_exit(5) == 1
            assert time.monotonic() - started < 3
    assert_nothing_left(server, children)


@pytest.mark.parametrize("when", ["before the server is there", "while loading"])
def test_signal_during_the_start(model: Path, tmp_path: Path, when: str) -> None:
    with ServerProcess(model, tmp_path / "log", FAKE_FAULT="hang_at_start") as server:
        url = server.url
        if when == "while loading":
            wait_until(lambda: server.status(f"{url}/health") == 503, "an answer while loading")
        server.signal()
        assert server.wait_exit(15) == 0
    assert server.leftovers() == []
    assert "Traceback" not in server.output


@pytest.mark.parametrize("module", [SCHEDULER, DETOKENIZER])
def test_death_of_a_child_ends_the_server(model: Path, tmp_path: Path, module: str) -> None:
    with ServerProcess(model, tmp_path / "log", FAKE_STEP_S="0.05") as server:
        url, children = server.wait_ready().url, server.children()
        request = Background(url, sampling_params={"max_new_tokens": 400})
        assert request.begun.wait(20)
        os.kill(server.child(module), signal.SIGKILL)
        started = time.monotonic()
        assert server.wait_exit(10) == 1
        assert time.monotonic() - started < 6
        lines = request.join()
    assert lines[-1] == "[DONE]"
    error = json.loads(lines[-2])["error"]
    assert "was killed by SIGKILL" in error["message"]
    assert error["type"] == "server_error"
    errors = [line for line in server.output.splitlines() if line.startswith("ramet: error:")]
    assert len(errors) == 1
    assert "SIGKILL" in errors[0]
    assert_nothing_left(server, children)


def test_waiting_requests_get_an_error_when_a_child_dies(model: Path, tmp_path: Path) -> None:
    with ServerProcess(model, tmp_path / "log", FAKE_FAULT="die_at_token") as server:
        answer = httpx.post(f"{server.wait_ready().url}/generate", json={"text": "a"}, timeout=20)
        assert answer.status_code == 503
        assert "exit code 7" in answer.json()["error"]["message"]
        assert server.wait_exit(10) == 1


def test_a_killed_server_leaves_nothing_behind(model: Path, tmp_path: Path) -> None:
    with ServerProcess(model, tmp_path / "log") as server:
        server.wait_ready()
        children = server.children()
        server.signal(signal.SIGKILL)
        server.wait_exit()
    for child in children:
        wait_until(lambda child=child: not Path(f"/proc/{child}").exists(), f"the end of process {child}", 10)
    wait_until(lambda: server.leftovers() == [], "the end of its sockets", 10)


def test_port_in_use(model: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert_fails(ServerProcess(model, tmp_path / "log", "--port", port), f"port {port} (--host, --port)")


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("fail_start", "the fake scheduler was told to fail"),
        ("die_at_start", "the scheduler (rank 0) ended with exit code 3 while starting"),
    ],
)
def test_scheduler_that_can_not_start(model: Path, tmp_path: Path, fault: str, words: str) -> None:
    assert_fails(ServerProcess(model, tmp_path / "log", FAKE_FAULT=fault), words)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model-pth", "x"], "--model-pth"),
        (["--port", "99999"], "--port"),
        (["--dtype", "int4"], "--dtype"),
        (["--host", "no.such.host.invalid"], "--host"),
    ],
)
def test_wrong_flags(model: Path, tmp_path: Path, flags: list[str], words: str) -> None:
    assert_fails(ServerProcess(model, tmp_path / "log", *flags, fake=False), words)


def test_missing_model(tmp_path: Path) -> None:
    missing = tmp_path / "a" / "b"
    assert_fails(ServerProcess(missing, tmp_path / "log", fake=False), f"model path {missing} does not exist")


def test_missing_config_and_tokenizer(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    assert_fails(ServerProcess(folder, tmp_path / "log1", fake=False), "config.json does not exist")
    (folder / "config.json").write_bytes((model / "config.json").read_bytes())
    assert_fails(ServerProcess(folder, tmp_path / "log2"), "tokenizer.json")


def test_full_queue_is_a_503(model: Path, tmp_path: Path) -> None:
    flags = ["--max-running-requests", "1", "--max-queued-requests", "1"]
    with ServerProcess(model, tmp_path / "log", *flags, FAKE_STEP_S="0.05") as server:
        url = server.wait_ready().url
        requests = [Background(url, sampling_params={"max_new_tokens": 100}) for _ in range(2)]
        assert all(request.begun.wait(20) for request in requests)
        for stream in (False, True):
            answer = httpx.post(f"{url}/generate", json={"text": "a", "stream": stream})
            assert answer.status_code == 503
            assert "queue is full" in answer.json()["error"]["message"]
        httpx.post(f"{url}/abort_request", json={"abort_all": True})
        for request in requests:
            request.join()


def test_keys(model: Path, tmp_path: Path) -> None:
    with ServerProcess(model, tmp_path / "log", "--api-key", "user-key", "--admin-api-key", "admin-key") as server:
        url = server.wait_ready().url

        def status(method: str, path: str, key: str | None, **options: Any) -> int:
            headers = {} if key is None else {"Authorization": f"Bearer {key}"}
            return httpx.request(method, f"{url}{path}", headers=headers, **options).status_code

        for path in ("/health", "/health_generate"):
            assert status("GET", path, None) == 200
        for path in ("/get_model_info", "/v1/models", "/metrics", "/openapi.json", "/nothing"):
            assert status("GET", path, None) == 401
            assert status("GET", path, "user-key2") == 401
        for key in ("user-key", "admin-key"):
            assert status("GET", "/v1/models", key) == 200
            assert status("POST", "/generate", key, json={"text": "a"}) == 200
            assert status("POST", "/abort_request", key, json={"rid": "x"}) == 200
        for path in ("/flush_cache", "/start_profile", "/stop_profile"):
            assert status("POST", path, "user-key") == 401
        assert status("POST", "/flush_cache", "admin-key") == 200
        assert status("POST", "/abort_request", "user-key", json={"abort_all": True}) == 401
        assert status("POST", "/abort_request", "admin-key", json={"abort_all": True}) == 200
        answer = httpx.get(f"{url}/v1/models", headers={"Authorization": "Basic user-key"})
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert "user-key" not in httpx.get(f"{url}/get_server_info", headers={"Authorization": "Bearer user-key"}).text


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        ("-n 12", "ulimit -n allows a process 12 files"),
        ("-n 63", "ulimit -n allows a process 63 files"),
        ("-v 500000", "ulimit -v allows a process 500000 kB of addresses"),
    ],
)
def test_a_limit_that_is_too_low_is_named(model: Path, tmp_path: Path, limit: str, words: str) -> None:
    command = f'ulimit {limit} && exec "$0" -m ramet.launch_server --device cpu --port 0 --model-path "$1"'
    environment = {**os.environ, "PYTHONPATH": str(PYTHON_FOLDER), "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        ["sh", "-c", command, sys.executable, str(model)], env=environment, capture_output=True, text=True, timeout=60
    )
    errors = [line for line in done.stderr.splitlines() if line.startswith("ramet: error:")]
    assert done.returncode == 1 and len(errors) == 1 and words in errors[0], done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
