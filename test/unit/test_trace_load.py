"""What a trace counts, on a package of three files whose calls can be counted by hand."""

import importlib.util
import sys
import threading
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmark"

FILES = {
    "top.py": """
from traced_case import below, ground

def run(ask):
    below.work()
    return [ground.leaf(number) for number in range(3)] and ask()
""",
    "below.py": """
from traced_case import ground

def work():
    own()
    ground.leaf(0)

def own():
    pass
""",
    "ground.py": """
def leaf(number):
    return number
""",
}


@pytest.fixture
def case(tmp_path, monkeypatch):
    package = tmp_path / "traced_case"
    package.mkdir()
    for name, text in {"__init__.py": "", **FILES}.items():
        (package / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(BENCHMARK))
    spec = importlib.util.spec_from_file_location("trace_load", BENCHMARK / "trace_load.py")
    trace_load = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(trace_load)
    yield trace_load.Trace(package), package
    for name in [name for name in sys.modules if name.startswith("traced_case")]:
        del sys.modules[name]


def counts(trace):
    calls = {trace.short(file): number for file, number in trace.calls.items()}
    returns = {(trace.short(a), trace.short(b)): number for (a, b), number in trace.returns.items()}
    return calls, returns


def test_calls_and_returns_into_other_files_are_counted(case):
    trace, _ = case
    from traced_case import top

    with trace:
        top.run(lambda: 1)
    top.run(lambda: 1)  # after it: not counted
    calls, returns = counts(trace)
    comprehension = sys.version_info < (3, 12)  # a function of its own until then
    assert calls == {"top.py": 1 + comprehension, "below.py": 2, "ground.py": 4}
    assert returns == {("ground.py", "below.py"): 1, ("below.py", "top.py"): 1, ("ground.py", "top.py"): 3}
    assert trace.row() == (3, 7 + comprehension, 5, 3)


def test_threads_that_are_started_meanwhile_count_and_others_do_not(case):
    trace, _ = case
    from traced_case import below

    go = threading.Event()
    before = threading.Thread(target=lambda: go.wait(10) and below.work())
    before.start()
    with trace:
        inside = threading.Thread(target=below.work)
        inside.start()
        inside.join(10)
        go.set()
        before.join(10)
    assert counts(trace)[0] == {"below.py": 2, "ground.py": 1}
