"""`Engine`: one instance inside a Python program, with the fake scheduler in the place of the real one."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ramet import Engine
from ramet.srt.entrypoints.child_processes import LaunchError
from ramet.srt.errors import ServiceError
from server_process import PYTHON_FOLDER, TEST_FOLDER, wait_until, write_weightless_model


class FakeEngine(Engine):
    """With no model behind it."""

    scheduler_module = "fake_scheduler"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weightless_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", autouse=True)
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{PYTHON_FOLDER}{os.pathsep}{TEST_FOLDER}")
        patch.setenv("FAKE_STEP_S", "0.005")
        yield


@pytest.fixture(scope="module")
def engine(model: Path, environment: None) -> Iterator[Engine]:
    with FakeEngine(model_path=str(model)) as engine:
        yield engine


def test_generate(engine: Engine) -> None:
    output: Any = engine.generate(input_ids=[10, 11], sampling_params={"max_new_tokens": 3})
    assert output["output_ids"] == [10, 11, 10]
    outputs: Any = engine.generate(["a", "b"], {"max_new_tokens": 2})
    assert [one["text"] for one in outputs] == ["aa", "bb"]
    output = engine.generate("a", {"max_new_tokens": 1}, return_logprob=True, rid="mine")
    assert output["meta_info"]["id"] == "mine"
    assert len(output["meta_info"]["output_token_logprobs"]) == 1


def test_stream(engine: Engine) -> None:
    texts = [one["text"] for one in engine.generate("a", {"max_new_tokens": 5}, stream=True)]
    assert texts[-1] == "aaaaa"
    assert texts == sorted(texts)


def test_leaving_a_stream_aborts_it(engine: Engine) -> None:
    for _ in engine.generate("a", {"max_new_tokens": 400}, stream=True):
        break
    wait_until(lambda: engine.get_server_info()["internal_states"][0]["num_running_reqs"] == 0, "the abort", 1.5)


async def test_from_a_running_loop(engine: Engine) -> None:
    outputs = await asyncio.gather(*(engine.async_generate("a", {"max_new_tokens": n}) for n in (1, 2, 3)))
    assert [one["text"] for one in outputs] == ["a", "aa", "aaa"]
    stream: Any = await engine.async_generate("b", {"max_new_tokens": 3}, stream=True)
    assert [one["text"] async for one in stream][-1] == "bbb"
    output: Any = engine.generate("c", {"max_new_tokens": 1})
    assert output["text"] == "c", "the blocking call works there too"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "text and input_ids"),
        ({"prompt": ""}, "text"),
        ({"prompt": "a", "sampling_params": {"top_p": 5}}, "top_p"),
        ({"prompt": "a", "image_data": 1}, "image_data"),
        ({"input_ids": [10**6]}, "input_ids"),
    ],
)
def test_mistakes_are_value_errors(engine: Engine, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        engine.generate(**arguments)
    with pytest.raises(ValueError, match=words):
        list(engine.generate(**arguments, stream=True))


def test_information_and_cache(engine: Engine, model: Path) -> None:
    assert engine.get_server_info()["model_path"] == str(model)
    assert engine.flush_cache() is True
    engine.abort_request("unknown")
    with pytest.raises(ValueError, match="exactly one"):
        engine.abort_request()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"model_path": "/no/such/folder"}, "does not exist"),
        ({"model_path": "m", "log_requests": True}, "log_requests is for servers: an Engine has no HTTP"),
        ({}, "model_path"),
        ({"model_path": "x", "colour": "green"}, "colour"),
        ({"model_path": "x", "page_size": 0}, "--page-size"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        FakeEngine(**arguments)


def test_a_start_that_fails(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_FAULT", "fail_start")
    with pytest.raises(LaunchError, match="was told to fail"):
        FakeEngine(model_path=str(model))


def test_shutdown(model: Path) -> None:
    engine = FakeEngine(model_path=str(model))
    stream = engine.generate("a", {"max_new_tokens": 400}, stream=True)
    next(stream)
    engine.shutdown()
    with pytest.raises(ServiceError):
        list(stream)
    engine.shutdown()
    with pytest.raises(ServiceError, match="shut down"):
        engine.generate("a")


def test_death_of_a_child(model: Path) -> None:
    before = fake_schedulers()
    engine = FakeEngine(model_path=str(model))
    (pid,) = fake_schedulers() - before
    stream = engine.generate("a", {"max_new_tokens": 400}, stream=True)
    next(stream)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(ServiceError, match="SIGKILL"):
        list(stream)
    with pytest.raises(ServiceError, match="SIGKILL"):
        wait_until(lambda: engine.generate("a") is None, "an error")
    engine.shutdown()


def fake_schedulers() -> set[int]:
    """Process ids of this test run's fake schedulers."""
    return {
        int(folder.name)
        for folder in Path("/proc").iterdir()
        if folder.name.isdigit() and b"fake_scheduler" in read(folder / "cmdline") and is_ours(folder)
    }


def read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:
        return b""


def is_ours(folder: Path) -> bool:
    fields = read(folder / "stat").rsplit(b")", 1)
    return len(fields) == 2 and int(fields[1].split()[1]) == os.getpid()


SCRIPT = """
from ramet import Engine

class FakeEngine(Engine):
    scheduler_module = "fake_scheduler"

engine = FakeEngine(model_path={model!r})
print(engine.generate("a", {{"max_new_tokens": 2}})["text"])
{end}
"""


@pytest.mark.parametrize("end", ["", "raise SystemExit(3)", "1 / 0"])
def test_script_without_a_main_guard_and_without_shutdown(model: Path, tmp_path: Path, end: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(model=str(model), end=end))
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    result = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "TMPDIR": str(temporary)},
    )
    assert result.stdout == "aa\n"
    assert result.returncode == {"": 0, "raise SystemExit(3)": 3, "1 / 0": 1}[end]
    assert result.stderr.count("Traceback") == (end == "1 / 0"), result.stderr
    assert list(temporary.iterdir()) == []
