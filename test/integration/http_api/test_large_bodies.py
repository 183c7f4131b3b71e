"""Large bodies through a real server: they are refused or answered as small ones are, and others don't notice."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import httpx
import pytest
from server_process import ServerProcess

JSON = {"Content-Type": "application/json"}


def repeated(item: str, number: int) -> str:
    return "[" + ",".join([item] * number) + "]"


def helpers_of(server: ServerProcess) -> list[int]:
    """The processes that look at large bodies."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            parent = int((path.parent / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == server.process.pid and b"entrypoints.body_process" in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/generate", f'{{"input_ids": {repeated("1.0", 5_000_000)}}}', 413, "values"),
        ("/generate", f'{{"input_ids": {repeated("1.0", 500_000)}}}', 400, "context"),
        ("/generate", f'{{"input_ids": {repeated("7", 1_000_000)}}}', 400, "context"),
        ("/generate", f'{{"text": {repeated(chr(34) + "x" + chr(34), 100_000)}}}', 400, "text"),
        ("/generate", '{"text": "' + "a" * 3_000_000 + '"}', 400, "context"),
        ("/generate", "[" * 1_000_000, 400, "nested"),
        ("/v1/chat/completions", '{"model": "fake", "messages": ' + repeated("{}", 100_000) + "}", 400, "messages"),
    ],
    ids=range(7),
)
def test_they_are_refused_while_health_answers(
    http: httpx.Client, path: str, body: str, status: int, words: str
) -> None:
    slowest = 0.0
    end = threading.Event()

    def watch() -> None:
        nonlocal slowest
        while not end.wait(0.02):
            start = time.monotonic()
            assert http.get("/health").status_code == 200
            slowest = max(slowest, time.monotonic() - start)

    watching = threading.Thread(target=watch)
    watching.start()
    answer = http.post(path, content=body, headers=JSON)
    end.set()
    watching.join()
    assert answer.status_code == status, answer.text
    assert words in answer.json()["error"]["message"]
    assert slowest < 1.0  # it was up to 48 s


def test_large_ones_that_are_sound_are_answered(http: httpx.Client) -> None:
    body = {"input_ids": [[5, 6, 7]] * 1500, "sampling_params": {"max_new_tokens": 1}}
    answer = http.post("/generate", content=json.dumps(body), headers=JSON, timeout=60)
    assert answer.status_code == 200 and len(answer.json()) == 1500


def test_a_helper_that_dies_costs_its_request_alone(model: str, tmp_path: Path) -> None:
    body = f'{{"input_ids": {repeated("1", 100_000)}}}'
    with ServerProcess(model, tmp_path / "log") as server:
        url = server.wait_ready().url
        for _ in range(2):
            assert "context" in httpx.post(f"{url}/generate", content=body, headers=JSON).text
            (pid,) = helpers_of(server)
            os.kill(pid, signal.SIGKILL)
            assert httpx.post(f"{url}/generate", content=body, headers=JSON).status_code == 400
        assert "context" in httpx.post(f"{url}/generate", content=body, headers=JSON).text
        assert len(helpers := helpers_of(server)) == 1
        server.signal(signal.SIGTERM)
        assert server.wait_exit() == 0
        assert not any(Path(f"/proc/{pid}").exists() for pid in helpers)
    assert "Traceback" not in server.output
