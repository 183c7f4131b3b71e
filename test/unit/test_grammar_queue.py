"""Requests whose constraint is being compiled: in order, in threads, refused or taken out."""

import threading
from types import SimpleNamespace

import pytest
from ramet.srt.managers.grammar_queue import GrammarQueue, UnusableGrammar
from ramet.srt.managers.io_struct import TokenizedGenerateReqInput
from ramet.srt.managers.schedule_batch import Req
from ramet.srt.sampling.sampling_params import SamplingParams

TIMEOUT_S = 10.0


class SlowBackend:
    """Compiles a regex when the test says so; "bad" can't be compiled, "broken" is the backend's own fault."""

    def __init__(self):
        self.gates = {}

    def compile(self, params):
        assert self.gates[params.regex].wait(TIMEOUT_S)
        if params.regex == "bad":
            raise ValueError("regex can't be used")
        if params.regex == "broken":
            raise RuntimeError("out of luck")
        return SimpleNamespace(name=params.regex)


@pytest.fixture()
def backend():
    backend = SlowBackend()
    yield backend
    for gate in backend.gates.values():
        gate.set()


@pytest.fixture()
def queue(backend):
    return GrammarQueue(backend)


def put(queue, backend, regex, is_open=False, group=0):
    backend.gates[regex] = threading.Event()
    if is_open:
        backend.gates[regex].set()
    message = TokenizedGenerateReqInput(rid=regex, input_ids=[1, 2], sampling_params=SamplingParams(regex=regex))
    queue.put(message, sampling_seed=7, group=group)


def test_what_is_compiled_can_run(queue, backend):
    put(queue, backend, "a", is_open=True, group=2)
    assert list(queue.groups()) == [2]
    queue.wait(TIMEOUT_S)
    (req,) = queue.collect()
    assert isinstance(req, Req) and req.grammar.name == "a"
    assert (req.rid, req.sampling_seed, req.group) == ("a", 7, 2)
    assert len(queue) == 0 and queue.collect() == []


def test_a_slow_one_does_not_hold_up_the_others(queue, backend):
    put(queue, backend, "slow")
    put(queue, backend, "fast", is_open=True)
    for _ in range(1000):
        queue.wait(0.01)
        if found := queue.collect():
            break
    assert [req.rid for req in found] == ["fast"] and len(queue) == 1
    backend.gates["slow"].set()
    queue.wait(TIMEOUT_S)
    assert [req.rid for req in queue.collect()] == ["slow"]


def test_they_come_out_in_the_order_in_which_they_came(queue, backend):
    for name in "abcd":
        put(queue, backend, name, is_open=True)
    queue.wait(TIMEOUT_S)
    assert [req.rid for req in queue.collect()] == list("abcd")


def test_what_cannot_be_compiled_comes_out_with_the_reason(queue, backend):
    put(queue, backend, "bad", is_open=True)
    queue.wait(TIMEOUT_S)
    (unusable,) = queue.collect()
    assert isinstance(unusable, UnusableGrammar)
    assert (unusable.message.rid, unusable.reason) == ("bad", "regex can't be used")


def test_a_fault_of_the_backend_is_no_fault_of_the_request(queue, backend):
    put(queue, backend, "broken", is_open=True)
    queue.wait(TIMEOUT_S)
    with pytest.raises(RuntimeError, match="out of luck"):
        queue.collect()


def test_who_is_taken_out_does_not_come_back(queue, backend):
    for name in ("first", "second", "third"):  # the third waits for a thread
        put(queue, backend, name)
    assert [message.rid for message in queue.take_out(lambda rid: rid != "second")] == ["first", "third"]
    for gate in backend.gates.values():
        gate.set()
    queue.wait(TIMEOUT_S)
    assert [req.rid for req in queue.collect()] == ["second"]


def test_waiting_ends_in_time(queue, backend):
    put(queue, backend, "slow")
    queue.wait(0.01)
    assert queue.collect() == [] and len(queue) == 1


def test_constraints_can_be_off():
    message = TokenizedGenerateReqInput(rid="a", input_ids=[1], sampling_params=SamplingParams(regex="a"))
    with pytest.raises(ValueError, match="--grammar-backend none"):
        GrammarQueue(None).put(message, sampling_seed=0, group=0)
