"""Constraints in processes of their own: what crashes, takes too long or too much costs one request."""

import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ramet.srt.managers import grammar_limits, grammar_pool
from ramet.srt.managers.grammar_limits import Stage
from ramet.srt.managers.grammar_link import GrammarLink
from ramet.srt.managers.grammar_messages import Compile, Open
from ramet.srt.managers.grammar_pool import GrammarPool
from ramet.srt.managers.request_grammar import RequestGrammar
from ramet.srt.sampling.constraint import Constraint
from random_models import EOS, IM_END, write_tokenizer

VOCAB_SIZE = 331
TIMEOUT_S = 20.0
SLOW_TO_COMPILE = Constraint("json_schema", '{"type":"integer","multipleOf":800001}')  # seconds
AMBIGUOUS = Constraint("ebnf", "root ::= s\ns ::= s s s | s s | [a-z ]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(Path(path))
    return str(path)


@pytest.fixture(scope="module")
def shared_pool(folder: str) -> Iterator[GrammarPool]:
    pool = GrammarPool(lambda: folder, VOCAB_SIZE, [EOS, IM_END])
    yield pool
    pool.close()


@pytest.fixture()
def pool(shared_pool: GrammarPool) -> Iterator[GrammarPool]:
    yield shared_pool
    for holder in list(shared_pool._holders.values()):
        for grammar in list(holder.grammars.values()):
            grammar.close()


def regex(text: str) -> Constraint:
    return Constraint("regex", text)


def opened(pool: GrammarPool, constraint: Constraint) -> RequestGrammar:
    grammar = pool.open(constraint)
    pool.wait([grammar], TIMEOUT_S)
    assert not grammar.is_busy
    return grammar


def allowed(grammar: RequestGrammar) -> set[int]:
    return {token for token in range(VOCAB_SIZE) if grammar.mask[token // 8] >> token % 8 & 1}


def advance(pool: GrammarPool, grammar: RequestGrammar, token_id: int) -> None:
    grammar.advance(token_id, True)
    assert grammar.is_busy
    pool.wait([grammar], TIMEOUT_S)
    assert not grammar.is_busy


def until(pool: GrammarPool, is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not is_so():
        assert time.monotonic() < deadline
        pool.poll(0.01)


def pid_of(pool: GrammarPool, grammar: RequestGrammar) -> int:
    link = pool._holders[grammar.constraint].link
    assert link is not None
    until(pool, lambda: link._pid != 0)
    return link._pid


def test_nothing_runs_before_the_first_constraint(folder: str) -> None:
    pool = GrammarPool(lambda: folder, VOCAB_SIZE, [EOS])
    pool.poll(0.0)
    assert pool._nursery is None
    pool.close()
    with pytest.raises(ValueError, match="end-of-sequence"):
        GrammarPool(lambda: folder, VOCAB_SIZE, [])


def test_a_request_follows_its_constraint(pool: GrammarPool) -> None:
    grammar, other = opened(pool, regex("a[bc]")), opened(pool, regex("a[bc]"))
    assert pid_of(pool, grammar) == pid_of(pool, other), "one process for each constraint"
    (first,) = (token for token in allowed(grammar) if len(allowed(grammar)) == 1)
    advance(pool, grammar, first)
    assert len(allowed(grammar)) >= 2 and allowed(other) == {first}
    assert not grammar.is_terminated
    advance(pool, grammar, min(allowed(grammar) - {EOS, IM_END}))
    assert grammar.is_terminated and allowed(grammar) == {EOS, IM_END}
    assert not grammar.allows_beyond(frozenset((EOS, IM_END))) and other.allows_beyond(frozenset((EOS, IM_END)))


def test_what_cannot_be_compiled_says_why_and_leaves_nothing(pool: GrammarPool) -> None:
    grammar = opened(pool, regex("(unclosed"))
    assert grammar.failure is not None and grammar.failure.status_code == 400
    assert grammar.failure.message.startswith("regex can't be used: ") and "unclosed" in grammar.failure.message
    assert grammar.constraint not in pool._holders


def test_a_crash_costs_the_request_that_caused_it(pool: GrammarPool) -> None:
    good = opened(pool, regex("[a-f]+"))
    crashing = pool.open(SLOW_TO_COMPILE)
    until(pool, lambda: pool._holders[SLOW_TO_COMPILE].link is not None)
    os.kill(pid_of(pool, crashing), signal.SIGSEGV)
    pool.wait([crashing], TIMEOUT_S)
    assert crashing.failure is not None and crashing.failure.status_code == 400
    assert "json_schema can't be used: the grammar library broke down" in crashing.failure.message
    advance(pool, good, min(allowed(good) - {EOS, IM_END}))
    assert good.failure is None


def test_a_process_that_is_killed_is_replaced_where_its_requests_were(pool: GrammarPool) -> None:
    grammar, other = opened(pool, regex("[a-d][e-h][i-l]")), opened(pool, regex("[a-d][e-h][i-l]"))
    advance(pool, grammar, min(allowed(grammar)))
    before = allowed(grammar), allowed(other)
    pid = pid_of(pool, grammar)
    os.kill(pid, signal.SIGKILL)
    until(pool, lambda: pid_of(pool, grammar) != pid)
    pool.wait([grammar, other], TIMEOUT_S)
    assert (allowed(grammar), allowed(other)) == before
    advance(pool, grammar, min(allowed(grammar)))
    assert grammar.failure is None and allowed(grammar) != before[0]


def test_a_token_that_takes_too_long_ends_its_request_alone(pool: GrammarPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_limits, "STEP_CPU_S", 0.001)
    slow, other = opened(pool, AMBIGUOUS), opened(pool, AMBIGUOUS)
    first = min(allowed(slow))
    for _ in range(200):  # the process gets tokens faster than it can follow
        slow.advance(first, True)
    pool.wait([slow], TIMEOUT_S)
    assert slow.failure is not None and slow.failure.status_code == 400
    assert "can't go on" in slow.failure.message
    pool.wait([other], TIMEOUT_S)
    advance(pool, other, first)
    assert other.failure is None and other.mask


def test_a_request_has_so_much_computing(pool: GrammarPool) -> None:
    grammar = opened(pool, AMBIGUOUS)
    grammar.cpu_left_s = -1.0
    advance(pool, grammar, min(allowed(grammar)))
    assert grammar.failure is not None and grammar.failure.status_code == 400
    assert "too much computing" in grammar.failure.message


def test_what_compiles_for_too_long_makes_room_and_is_ended(pool: GrammarPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_limits, "SLICE_CPU_S", 0.01)
    monkeypatch.setattr(grammar_limits, "COMPILE_CPU_S", 0.04)
    slow = [
        pool.open(Constraint("json_schema", f'{{"type":"integer","multipleOf":{n}}}')) for n in range(800_001, 800_006)
    ]
    quick = opened(pool, regex("quick[0-9]"))
    assert quick.failure is None
    assert all(one.is_busy for one in slow), "behind five that take seconds each"
    slow[4].close()
    assert slow[4].constraint not in pool._holders, "nobody waits for it any more"
    pool.wait(slow, TIMEOUT_S)
    for one in slow[:4]:
        assert one.failure is not None and one.failure.status_code == 400
        assert "more than 0.04 s" in one.failure.message


def test_waiting_has_an_end(pool: GrammarPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_limits, "COMPILE_WALL_S", -1.0)
    grammar = opened(pool, SLOW_TO_COMPILE)
    assert grammar.failure is not None and grammar.failure.status_code == 503


def test_processes_that_nobody_uses_are_kept_up_to_a_number(pool: GrammarPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_pool, "MAX_IDLE", 2)
    for text in "abcd":
        opened(pool, regex(text)).close()
    idle = [holder.constraint.text for holder in pool._links.values() if not holder.grammars]
    assert idle == ["c", "d"]
    pid = pid_of(pool, opened(pool, regex("d")))
    assert pid and pool._holders[regex("d")].stage is Stage.COMPILED


def test_too_much_memory_together_ends_the_largest(pool: GrammarPool, monkeypatch: pytest.MonkeyPatch) -> None:
    grammar = opened(pool, regex("[a-z]{1,100}"))
    monkeypatch.setattr(grammar_limits, "MAX_TOTAL_BYTES", -1)
    monkeypatch.setattr(grammar_limits, "MEMORY_PERIOD_S", 0.0)
    until(pool, lambda: grammar.failure is not None)
    assert grammar.failure is not None and grammar.failure.status_code == 503


def test_the_nursery_may_be_killed(pool: GrammarPool) -> None:
    grammar = opened(pool, regex("[a-d]+"))
    assert pool._nursery is not None
    pool._nursery._process.kill()
    until(pool, lambda: grammar.is_busy)
    pool.wait([grammar], TIMEOUT_S)
    advance(pool, grammar, min(allowed(grammar) - {EOS, IM_END}))
    assert grammar.failure is None


def test_a_nursery_that_stands_still_is_replaced(pool: GrammarPool, monkeypatch: pytest.MonkeyPatch) -> None:
    following = opened(pool, regex("[m-p]+"))
    stopped = pool._nursery
    assert stopped is not None
    os.kill(stopped._process.pid, signal.SIGSTOP)
    monkeypatch.setattr(grammar_limits, "HELLO_WALL_S", 0.5)
    monkeypatch.setattr(grammar_pool, "QUICK_SLOTS", 16)
    waiting = [pool.open(regex(f"[m-p]{{{number}}}")) for number in range(1, 9)]  # more than were made ready
    until(pool, lambda: pool._nursery is not stopped)
    monkeypatch.setattr(grammar_limits, "HELLO_WALL_S", 30.0)
    pool.wait([following, *waiting], TIMEOUT_S)
    assert all(grammar.failure is None and allowed(grammar) for grammar in (following, *waiting))
    for grammar in waiting:
        grammar.close()


def test_the_nursery_s_processes_may_end_before_its_socket(pool: GrammarPool, monkeypatch: pytest.MonkeyPatch) -> None:
    grammar = opened(pool, regex("[i-l]+"))
    pid = pid_of(pool, grammar)
    nursery = pool._nursery
    assert nursery is not None
    with monkeypatch.context() as patch:
        patch.setattr(nursery, "last_words", lambda: "")
        nursery._process.kill()
        until(pool, lambda: not Path(f"/proc/{pid}").exists() or "zombie" in status_of(pid))
        for _ in range(20):
            pool.poll(0.005)
    until(pool, lambda: pool._nursery is not nursery)
    pool.wait([grammar], TIMEOUT_S)
    assert grammar.failure is None and allowed(grammar)


def test_who_leaves_before_the_process_has_said_hello_leaves_none_behind(pool: GrammarPool) -> None:
    opened(pool, regex("[e-h]+")).close()
    assert pool._nursery is not None
    link = GrammarLink(pool._nursery)
    link.send(Compile(SLOW_TO_COMPILE))
    link.send(Open(1, []))
    link.flush()
    select.select([link.socket], [], [], TIMEOUT_S)  # it is there, and nobody has read it
    assert not link.has_begun
    link.close()
    assert link.has_begun
    until(pool, lambda: not Path(f"/proc/{link._pid}").exists() or "zombie" in status_of(link._pid))


def status_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return "zombie"


def test_a_library_that_cannot_start_is_said(tmp_path: Path) -> None:
    pool = GrammarPool(lambda: str(tmp_path), VOCAB_SIZE, [EOS])
    grammar = opened(pool, regex("a"))
    assert grammar.failure is not None and grammar.failure.status_code == 503
    assert "no tokenizer.json" in grammar.failure.message
    pool.close()


def test_a_process_may_serve_one_constraint_after_another(pool: GrammarPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_pool, "MAX_IDLE", 1)
    first = opened(pool, regex("[a-c]"))
    pid = pid_of(pool, first)
    first.close()
    second = opened(pool, regex("[d-f]"))
    assert pid_of(pool, second) == pid and regex("[a-c]") not in pool._holders
    assert allowed(second) and not allowed(second) & allowed(opened(pool, regex("[a-c]")))
    second.close()
