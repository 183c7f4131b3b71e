"""A model's own chat template can take neither all memory nor all time, and the next chat is served."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from ramet.srt.errors import RequestError, ServiceError
from ramet.srt.text import template_process
from ramet.srt.text.chat_template import ChatTemplate
from ramet.srt.text.template_process import TemplateFailed, render_template

USER = [{"role": "user", "content": "hi"}]
DOUBLED = "{% set n = namespace(x=START) %}{% for i in range(60) %}{% set n.x = STEP %}{% endfor %}"


def render(source: str) -> str:
    return ChatTemplate(source, {}, "model/chat_template.jinja").render(USER)


@pytest.fixture
def short_limits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(template_process, "CPU_S", 0.1)
    monkeypatch.setattr(template_process, "MEMORY_BYTES", 64 << 20)
    pool = template_process._Pool(1)
    monkeypatch.setattr(template_process, "_small", pool)
    yield
    pool.end()


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10**10 }}",
        "{{ messages | tojson(indent=10**10) }}",
        DOUBLED.replace("START", "'a'").replace("STEP", "n.x ~ n.x") + "{{ n.x }}",
        "{% for i in range(90000) %}{{ 'a' * 90000 }}{% endfor %}",
    ],
)
def test_memory_is_bounded(source: str, short_limits: None) -> None:
    with pytest.raises(RequestError, match=r"chat template (takes|makes) more than \d+ MiB") as caught:
        render(source)
    assert caught.value.status_code == 400
    assert render("{{ messages[0].content }}") == "hi"


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        DOUBLED.replace("START", "[1]").replace("STEP", "[n.x, n.x]") + "{{ n.x | string | length }}",
    ],
)
def test_time_is_bounded(source: str, short_limits: None) -> None:
    begun = time.monotonic()
    with pytest.raises(RequestError, match="takes more than 0.1 s of computing time"):
        render(source)
    assert time.monotonic() - begun < 10
    assert render("{{ messages[0].content }}") == "hi"


@pytest.mark.slow
def test_what_is_deaf_to_the_clock_is_ended(short_limits: None) -> None:
    deep = DOUBLED.replace("STEP", "[n.x, n.x]")
    source = deep.replace("START", "[1]") + "{% set one = n.x %}" + deep.replace("START", "[1]") + "{{ one == n.x }}"
    with pytest.raises(RequestError, match="took more than"):
        render(source)
    assert render("ok") == "ok"


def test_recursion_is_a_refusal() -> None:
    with pytest.raises(RequestError, match="recursion"):
        render("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}")


def test_a_process_keeps_its_templates_and_starts_anew_after_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_process, "MAX_TEMPLATES", 2)
    for number in range(4):
        assert render_template(f"{{{{ messages }}}}{number % 3}", {"messages": []}) == f"[]{number % 3}"


def test_many_chats_at_once() -> None:
    with ThreadPoolExecutor(8) as threads:
        texts = list(threads.map(lambda number: render_template("{{ x }}", {"messages": [], "x": number}), range(40)))
    assert texts == [str(number) for number in range(40)]


def test_a_large_chat_has_a_process_of_its_own() -> None:
    text = "植" * 200_000
    assert render_template("{{ messages[0].content }}", {"messages": [{"content": text}]}) == text


def test_a_syntax_error_has_its_line() -> None:
    with pytest.raises(TemplateFailed) as caught:
        render_template("a\n{% for %}", None)
    assert caught.value.line == 2


def test_a_process_that_somebody_ends_is_replaced(short_limits: None) -> None:
    assert render("one") == "one"
    (process,) = template_process._small._processes
    assert process._process is not None
    process._process.kill()
    process._process.wait()
    assert render("two") == "two"


def test_nobody_waits_for_processes_that_end(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = template_process._Pool(1)
    may_end = threading.Event()

    def render(_source: str, _request: bytes) -> str:
        may_end.wait(10)
        return ""

    monkeypatch.setattr(pool._processes[0], "render", render)
    monkeypatch.setattr(pool._processes[0], "end", may_end.set)
    with ThreadPoolExecutor(4) as threads:
        renderings = [threads.submit(pool.render, "", b"") for _ in range(4)]
        while not all(one.running() for one in renderings):
            time.sleep(0.001)
        time.sleep(0.05)  # they wait now
        pool.end()
        assert sorted(isinstance(one.exception(5), ServiceError) for one in renderings) == [False, True, True, True]
    assert pool.render("", b"") == "", "a later one is served"


def test_who_has_waited_longest_is_next(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = template_process._Pool(1)
    order: list[str] = []
    may_end = threading.Event()

    def render(source: str, _request: bytes) -> str:
        order.append(source)
        may_end.wait(10)
        return ""

    monkeypatch.setattr(pool._processes[0], "render", render)
    with ThreadPoolExecutor(4) as threads:
        for place, source in enumerate("abc"):
            threads.submit(pool.render, source, b"")
            while len(order) + len(pool._waiting) <= place:
                time.sleep(0.001)
        may_end.set()
        again = threads.submit(lambda: [pool.render("d", b"") for _ in range(3)])  # comes while others wait
        again.result(10)
    assert order == ["a", "b", "c", "d", "d", "d"]
