"""Requests whose constraint takes its time: they sit out passes, make room for others, and end alone."""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import random_models as rm
from engine_harness import EngineHarness
from ramet.srt.managers.io_struct import AbortReq
from ramet.srt.managers.request_grammar import RequestGrammar
from ramet.srt.sampling.constraint import Constraint

ANYTHING = b"\xff" * (4 * -(-331 // 32))
SLOW_S = 1.0


class SteppedPool:
    """Answers when the test says so."""

    def __init__(self) -> None:
        self.grammars: list[RequestGrammar] = []
        self.closed: list[RequestGrammar] = []

    def open(self, constraint: Constraint) -> RequestGrammar:
        grammar = RequestGrammar(len(self.grammars), constraint, self.step, self.closed.append)
        grammar.cpu_left_s = 1e9
        self.grammars.append(grammar)
        return grammar

    def step(self, grammar: RequestGrammar, _token_id: int, _wants_mask: bool) -> None:
        grammar.num_awaited += 1

    def poll(self, _timeout_s: float) -> None:
        """Nothing comes by itself."""

    def wait(self, grammars: Iterable[RequestGrammar], _timeout_s: float) -> None:
        assert not any(grammar.is_slow for grammar in grammars), "passes don't wait for slow ones"

    def answer(self, cpu_s: float = SLOW_S) -> None:
        for grammar in self.grammars:
            if grammar.is_busy:
                grammar.take(ANYTHING, False, cpu_s)

    def close(self) -> None:
        """Nothing runs."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rm.make_model(tmp_path_factory.mktemp("model"), "llama2")


@pytest.fixture(scope="module")
def make_engine(folder: Path) -> Callable[..., tuple[EngineHarness, Any]]:
    engines: dict[bool, EngineHarness] = {}

    def make(overlap: bool = False) -> tuple[EngineHarness, Any]:
        if overlap not in engines:
            engines[overlap] = EngineHarness(folder, overlap=overlap, max_running_requests=2)
        engine = engines[overlap]
        pool: Any = SteppedPool()
        engine.channel.outputs.clear()
        scheduler: Any = engine.scheduler
        scheduler.grammar_queue._pool = scheduler.grammar_steps._pool = pool
        return engine, pool

    return make


def steps(engine: EngineHarness, num: int) -> None:
    for _ in range(num):
        engine.step()


def run_with_answers(engine: EngineHarness, pool: SteppedPool) -> dict[str, Any]:
    for _ in range(500):
        pool.answer()
        engine.step()
        if not engine.scheduler.has_work:
            break
    engine.scheduler.check_caches()
    return engine.results()


@pytest.mark.parametrize("overlap", [False, True])
def test_others_go_on_while_a_constraint_computes(make_engine: Any, overlap: bool) -> None:
    engine, pool = make_engine(overlap)
    prompts = rm.random_prompts([9, 12])
    free = engine.generate(prompts, max_new_tokens=12)
    engine.channel.outputs.clear()
    engine.submit("slow", prompts[0], max_new_tokens=12, regex="a")
    engine.submit("free", prompts[1], max_new_tokens=12)
    steps(engine, 1)
    pool.answer()
    steps(engine, 30)
    results = engine.results()
    assert results["free"].token_ids == free[1].token_ids, "it has not waited"
    assert "slow" not in results, "its first token is not taken yet"
    results = run_with_answers(engine, pool)
    assert results["slow"].token_ids == free[0].token_ids
    assert pool.closed == pool.grammars


def test_a_slow_one_gives_its_place_to_those_that_wait(make_engine: Any) -> None:
    engine, pool = make_engine()
    prompts = rm.random_prompts([9, 12, 7, 8])
    alone = [engine.generate([prompt], max_new_tokens=6)[0].token_ids for prompt in prompts]
    engine.channel.outputs.clear()
    for number in range(2):
        engine.submit(f"slow{number}", prompts[number], max_new_tokens=6, regex=f"{number}")
    for _ in range(4):  # both hold a place, and are known to be slow
        engine.step()
        pool.answer()
        engine.step()
    engine.submit("a", prompts[2], max_new_tokens=6)
    engine.submit("b", prompts[3], max_new_tokens=6)
    steps(engine, 20)
    results = engine.results()
    assert [results[rid].token_ids for rid in "ab"] == alone[2:]
    engine.scheduler.check_caches()
    engine.send(AbortReq(rid="slow1"))
    steps(engine, 2)
    assert engine.results()["slow1"].finish_reason.type == "abort"
    results = run_with_answers(engine, pool)
    assert results["slow0"].token_ids == alone[0]
    assert len(pool.closed) == 2


def test_a_constraint_that_fails_ends_its_request_alone(make_engine: Any) -> None:
    engine, pool = make_engine()
    prompts = rm.random_prompts([9, 12])
    engine.submit("bad", prompts[0], max_new_tokens=8, regex="a", stream=True)
    engine.submit("good", prompts[1], max_new_tokens=8, regex="b")
    for _ in range(4):
        engine.step()
        pool.answer()
    engine.step()
    bad, good = pool.grammars
    assert bad.is_busy and good.is_busy
    bad.fail("too ambiguous", 400)
    results = run_with_answers(engine, pool)
    reason = results["bad"].finish_reason
    assert (reason.type, reason.status_code, reason.param) == ("abort", 400, "regex")
    assert reason.message == "constrained output can't go on: too ambiguous"
    assert results["good"].finish_reason.type == "length" and len(results["good"].token_ids) == 8


def test_waiting_for_a_constraint_counts_as_waiting(make_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, pool = make_engine()
    intake: Any = engine.scheduler.intake
    monkeypatch.setattr(intake, "_config", dataclasses.replace(intake._config, max_queued_requests=2))
    for number in range(4):
        engine.submit(str(number), [5, 6], max_new_tokens=2, regex=f"{number}")
    engine.step()
    refused = engine.results()
    assert set(refused) == {"2", "3"} and refused["2"].finish_reason.status_code == 503
    engine.send(AbortReq(abort_all=True))
    engine.step()
    assert len(pool.closed) == 2 and not engine.scheduler.has_work
