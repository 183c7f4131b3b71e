"""Fixtures: an instance with the fake scheduler behind it, and the published clients that talk to it."""

from collections.abc import Iterator

import httpx
import openai
import pytest
from ramet.srt.text.tokenizer import Tokenizer
from server_process import ServerProcess, write_weightless_model

CONTEXT_LEN = 256


@pytest.fixture(scope="package")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_weightless_model(tmp_path_factory.mktemp("model"), CONTEXT_LEN))


@pytest.fixture(scope="package")
def server(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("server") / "server.log"
    with ServerProcess(model, log, FAKE_STEP_S="0.002") as process:
        yield process.wait_ready()
    assert "Traceback" not in process.output


@pytest.fixture(scope="package")
def slow_server(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One whose requests are still running when they are wanted to be."""
    log = tmp_path_factory.mktemp("slow_server") / "server.log"
    with ServerProcess(model, log, FAKE_STEP_S="0.05") as process:
        yield process.wait_ready()


@pytest.fixture
def slow_http(slow_server: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=slow_server.url, timeout=30) as client:
        yield client


@pytest.fixture
def http(server: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=30) as client:
        yield client


@pytest.fixture
def client(server: ServerProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="package")
def tokenizer(model: str) -> Tokenizer:
    return Tokenizer.from_path(model)
