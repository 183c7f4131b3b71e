"""A chat template that takes all it can get: a 400 that says so, the server goes on, and nothing is left behind."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
from server_process import MODEL_NAME, ServerProcess, write_weightless_model

TEMPLATE = """
{%- set what = messages[0].content %}
{%- if what == "time" %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}
{%- elif what == "memory" %}{{ what * 10**10 }}
{%- elif what == "doubling" %}{% set n = namespace(x=what) %}
{%- for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}
{%- endif %}{{ what }}"""
REFUSALS = {"time": "2 s of computing time", "memory": "512 MiB of memory", "doubling": "512 MiB of memory"}


@pytest.fixture(scope="module")
def hungry_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = Path(write_weightless_model(tmp_path_factory.mktemp("hungry_model"), 256))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    with ServerProcess(folder, tmp_path_factory.mktemp("hungry_server") / "server.log") as process:
        yield process.wait_ready()


def chat(url: str, content: str) -> httpx.Response:
    body = {"model": MODEL_NAME, "messages": [{"role": "user", "content": content}], "max_tokens": 1}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)


@pytest.mark.slow
def test_a_hungry_template_costs_its_own_requests_alone(hungry_server: ServerProcess) -> None:
    url = hungry_server.url
    assert chat(url, "hello").status_code == 200
    process = psutil.Process(hungry_server.process.pid)
    before = process.memory_info().rss
    with ThreadPoolExecutor(6) as threads, httpx.Client(base_url=url) as client:
        answers = {what: threads.submit(chat, url, what) for what in REFUSALS}
        waits = []
        while not all(answer.done() for answer in answers.values()):
            begun = time.monotonic()
            assert client.get("/health").status_code == 200
            waits.append(time.monotonic() - begun)
    for what, answer in answers.items():
        assert answer.result().status_code == 400
        assert REFUSALS[what] in answer.result().json()["error"]["message"]
    assert len(waits) > 20
    assert sorted(waits)[len(waits) // 2] < 0.1, "nothing of it runs where requests are taken"
    assert process.memory_info().rss - before < 64 << 20
    assert chat(url, "hello").status_code == 200
    children = process.children(recursive=True)
    hungry_server.close()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []
