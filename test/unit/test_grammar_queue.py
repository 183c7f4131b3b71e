"""Requests whose constraint is being compiled: in order, refused, or taken out."""

from typing import Any

import pytest
from ramet.srt.managers.grammar_queue import GrammarQueue, UnusableGrammar
from ramet.srt.managers.io_struct import TokenizedGenerateReqInput
from ramet.srt.managers.request_grammar import RequestGrammar
from ramet.srt.managers.schedule_batch import Req
from ramet.srt.sampling.constraint import Constraint
from ramet.srt.sampling.sampling_params import SamplingParams


class SlowPool:
    """Compiles a regex when the test says so."""

    def __init__(self) -> None:
        self.opened: dict[str, RequestGrammar] = {}
        self.closed: list[str] = []

    def open(self, constraint: Constraint) -> RequestGrammar:
        grammar = RequestGrammar(
            len(self.opened), constraint, lambda *_: None, lambda one: self.closed.append(one.constraint.text)
        )
        self.opened[constraint.text] = grammar
        return grammar

    def finish(self, *texts: str) -> None:
        for text in texts:
            self.opened[text].take(b"\x01", False, 0.0)


@pytest.fixture()
def pool() -> SlowPool:
    return SlowPool()


@pytest.fixture()
def queue(pool: Any) -> GrammarQueue:
    return GrammarQueue(pool)


def put(queue: GrammarQueue, *texts: str, group: int = 0) -> None:
    for text in texts:
        message = TokenizedGenerateReqInput(rid=text, input_ids=[1, 2], sampling_params=SamplingParams(regex=text))
        queue.put(message, Constraint("regex", text), sampling_seed=7, group=group, arrival_s=3.0)


def test_what_is_compiled_can_run(queue: GrammarQueue, pool: SlowPool) -> None:
    put(queue, "a", group=2)
    assert list(queue.groups()) == [2] and list(queue.since_s()) == [3.0]
    assert queue.collect() == []
    pool.finish("a")
    (req,) = queue.collect()
    assert isinstance(req, Req) and req.grammar is pool.opened["a"]
    assert (req.rid, req.sampling_seed, req.group, req.arrival_s) == ("a", 7, 2, 3.0)
    assert len(queue) == 0 and queue.collect() == []


def test_a_slow_one_does_not_hold_up_the_others(queue: GrammarQueue, pool: SlowPool) -> None:
    put(queue, "slow", "b", "c")
    pool.finish("c", "b")
    assert [one.rid for one in queue.collect() if isinstance(one, Req)] == ["b", "c"], "in the order of their arrival"
    assert len(queue) == 1
    pool.finish("slow")
    assert [one.rid for one in queue.collect() if isinstance(one, Req)] == ["slow"]


def test_what_cannot_be_compiled_comes_out_with_the_reason(queue: GrammarQueue, pool: SlowPool) -> None:
    put(queue, "bad")
    pool.opened["bad"].fail("it has a hole", 400)
    (unusable,) = queue.collect()
    assert isinstance(unusable, UnusableGrammar)
    assert (unusable.message.rid, unusable.param) == ("bad", "regex")
    assert unusable.reason == ("regex can't be used: it has a hole", 400)


def test_who_is_taken_out_does_not_come_back_and_is_compiled_no_further(queue: GrammarQueue, pool: SlowPool) -> None:
    put(queue, "first", "second", "third")
    assert [one.message.rid for one in queue.take_out(lambda rid: rid != "second")] == ["first", "third"]
    assert pool.closed == ["first", "third"]
    pool.finish("first", "second", "third")
    assert [one.rid for one in queue.collect() if isinstance(one, Req)] == ["second"]


def test_constraints_can_be_off() -> None:
    with pytest.raises(ValueError, match="--grammar-backend none"):
        put(GrammarQueue(None), "a")
