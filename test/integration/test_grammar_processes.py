"""A real server under constraints that crash, compute or allocate: one request pays, and nothing is left behind."""

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import random_models as rm
from server_process import ServerProcess, is_running, wait_until

MODULE = b"ramet.srt.managers.grammar_process"
BUSY_BYTES = 100 << 20  # resident: what the slow ones take within a tenth of their time


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    model = rm.make_model(tmp_path_factory.mktemp("model"), "llama2")
    log = tmp_path_factory.mktemp("server") / "server.log"
    with ServerProcess(model, log, "--device", "cpu", "--max-total-tokens", "8192", fake=False) as process:
        yield process.wait_ready()
        assert "panicked" not in process.output


def generate(server: ServerProcess, timeout_s: float = 60.0, **params: Any) -> httpx.Response:
    body = {"text": "The quick", "sampling_params": {"max_new_tokens": 16, "temperature": 0, **params}}
    return httpx.post(f"{server.url}/generate", json=body, timeout=timeout_s)


def grammar_pids(server: ServerProcess) -> list[int]:
    """The processes for constraints that descend from the server, the oldest first."""
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            is_one = folder.name.isdigit() and MODULE in (folder / "cmdline").read_bytes()
            if is_one and f"TMPDIR={server.temporary}".encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return sorted(found)


def slow_to_compile(number: int) -> dict[str, Any]:
    """A schema that takes some seconds and hundreds of megabytes, where `number` has six digits."""
    return {"type": "integer", "multipleOf": number}


def busy_pid(server: ServerProcess) -> int | None:
    """The process that compiles one of these."""
    for pid in grammar_pids(server):
        with contextlib.suppress(OSError):
            resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            if resident > BUSY_BYTES:
                return pid
    return None


def test_none_runs_before_the_first_constraint(server: ServerProcess) -> None:
    assert generate(server).status_code == 200
    assert grammar_pids(server) == []
    assert generate(server, regex="[0-9]{3}").json()["text"].isdigit()
    assert len(grammar_pids(server)) >= 2, "the one that forks, and one for the constraint"


@pytest.mark.parametrize("kind", ["schema", "lark", "gbnf"])
def test_deep_constraints_are_answered(server: ServerProcess, kind: str) -> None:
    num = {"schema": 1000, "lark": 3000, "gbnf": 600}[kind]
    if kind == "schema":
        steps = {f"a{i}": {"properties": {"x": {"$ref": f"#/$defs/a{i + 1}"}}, "type": "object"} for i in range(num)}
        schema = {"$ref": "#/$defs/a0", "$defs": {**steps, f"a{num}": {"type": "string"}}}
        params = {"json_schema": json.dumps(schema)}
    else:
        rule = 'r{0}: "a" r{1} "c"\n' if kind == "lark" else 'r{0} ::= "a" r{1} "c"\n'
        rules = "".join(rule.format(i, i + 1) for i in range(num))
        params = {
            "ebnf": f'start: r0\n{rules}r{num}: "b"\n' if kind == "lark" else f'root ::= r0\n{rules}r{num} ::= "b"'
        }
    response = generate(server, **params)
    assert response.status_code == 200, response.text
    if kind != "schema":
        assert response.json()["text"] == "a" * 16


def test_a_crash_is_that_requests_error(server: ServerProcess) -> None:
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(generate(server, json_schema=slow_to_compile(999_983))))
    thread.start()
    os.kill(wait_until(lambda: busy_pid(server), "a process that compiles it"), signal.SIGSEGV)
    thread.join()
    assert answers[0].status_code == 400
    error = answers[0].json()["error"]
    assert error["param"] == "json_schema" and error["message"].startswith("json_schema can't be used: ")
    assert generate(server, regex="[a-c]{4}").status_code == 200


def test_who_leaves_takes_what_is_compiled_along(server: ServerProcess) -> None:
    with pytest.raises(httpx.ReadTimeout):
        generate(server, timeout_s=0.5, json_schema=slow_to_compile(999_979))
    wait_until(lambda: busy_pid(server) is None, "the end of what nobody waits for", timeout_s=2)


def test_an_ambiguous_grammar_holds_up_nobody(server: ServerProcess) -> None:
    answers: list[httpx.Response] = []
    ebnf = "root ::= s\ns ::= s s s | s s | [a-z ]"
    threads = [
        threading.Thread(target=lambda: answers.append(generate(server, ebnf=ebnf, max_new_tokens=45, temperature=1)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    times = []
    while any(thread.is_alive() for thread in threads):
        started = time.monotonic()
        assert generate(server).status_code == 200
        times.append(time.monotonic() - started)
    assert {answer.status_code for answer in answers} <= {200, 400}
    for answer in answers:
        if answer.status_code == 400:
            assert "constrained output can't go on" in answer.json()["error"]["message"]
    assert sorted(times)[len(times) // 2] < 1.0, "a pass takes milliseconds, one of its masks up to a second"


def test_the_processes_end_with_the_server(server: ServerProcess) -> None:
    generate(server, regex="[0-9]{2}")
    pids = grammar_pids(server)
    assert len(pids) >= 2
    os.kill(server.child("ramet.srt.managers.scheduler_process"), signal.SIGKILL)
    wait_until(lambda: not any(is_running(pid) for pid in pids), "their end")
    server.process.wait(30)
