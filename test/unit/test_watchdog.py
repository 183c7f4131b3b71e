"""Who is taken for dead, and who is not: long work, a debugger, a suspended host, whoever waits for somebody else."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from ramet.srt.distributed.words import Word
from ramet.srt.entrypoints.child_watch import ChildWatch
from ramet.srt.managers import watchdog
from ramet.srt.managers.pulse import (
    BEATS,
    END,
    HEARD_WORD,
    MAIN_SLOT,
    OWN_WORD,
    SERVES,
    TASK,
    BoardVoice,
    LauncherBeats,
    PulseBoard,
    Ticks,
    WatchLimits,
)
from ramet.srt.managers.watchdog import LauncherWatch, Watched, judge
from ramet.srt.server_args import ServerArgs

LIMITS = WatchLimits(20.0)  # still from 12 s on, doubt from 5, a long task from 10
PERIOD_S = 1.0


@pytest.fixture
def board():
    board = PulseBoard.create(4)
    yield board
    board.close()


@pytest.fixture
def ranks(board):
    ranks = [Watched(f"rank {slot}", os.getpid(), slot, LIMITS) for slot in range(3)]
    for rank in ranks:
        board.put(rank.slot, SERVES, 1)
    return ranks


def pass_seconds(board, ranks, seconds, beating):
    for _ in range(round(seconds / PERIOD_S)):
        for rank in ranks:
            if rank.slot in beating:
                board.put(rank.slot, BEATS, board.get(rank.slot, BEATS) + 1)
            rank.look(board, PERIOD_S)


def test_who_stands_still_is_doubted_and_then_final(board, ranks):
    pass_seconds(board, ranks, 100, {0, 1, 2})
    assert judge(ranks) is None
    pass_seconds(board, ranks, 5, {0, 2})
    assert judge(ranks) is None
    pass_seconds(board, ranks, 1, {0, 2})
    assert judge(ranks) is ranks[1] and not ranks[1].word.is_final
    assert "rank 1 has not moved for 6 s (--watchdog-timeout 20)" in ranks[1].word.text
    pass_seconds(board, ranks, 9, {0, 2})
    assert ranks[1].word.is_final
    pass_seconds(board, ranks, 1, {0, 1, 2})
    assert judge(ranks) is None


def test_a_pass_may_take_the_whole_timeout(board, ranks):
    board.put(0, TASK, 7)
    pass_seconds(board, ranks, 10, {0, 1, 2})
    assert judge(ranks) is None
    pass_seconds(board, ranks, 10, {0, 1, 2})
    assert judge(ranks) is ranks[0] and not ranks[0].word.is_final
    pass_seconds(board, ranks, 2, {0, 1, 2})
    assert ranks[0].word.is_final and "one forward pass" in ranks[0].word.text
    board.put(0, TASK, 8)  # the next one
    pass_seconds(board, ranks, 1, {0, 1, 2})
    assert judge(ranks) is None
    board.put(0, TASK, 0)
    pass_seconds(board, ranks, 100, {0, 1, 2})
    assert judge(ranks) is None, "who is at nothing is idle"


def test_who_waits_for_a_process_that_stands_still_is_not_named(board, ranks):
    board.put(0, TASK, 7)
    pass_seconds(board, ranks, 15, {0, 1, 2})
    pass_seconds(board, ranks, 3, {0, 1})
    assert judge(ranks) is None
    pass_seconds(board, ranks, 4, {0, 1})
    assert ranks[0].word.is_final and judge(ranks) is ranks[2] and not ranks[2].word.is_final


def test_a_start_moves_by_its_work_and_a_debugger_excuses(board, ranks, monkeypatch):
    board.put(0, SERVES, 0)
    monkeypatch.setattr(watchdog, "_work_done", lambda _pid: time.perf_counter_ns())
    pass_seconds(board, ranks, 100, {1, 2})
    assert judge(ranks) is None
    monkeypatch.setattr(watchdog, "_work_done", lambda _pid: 0)
    pass_seconds(board, ranks, 16, {1, 2})
    assert judge(ranks) is ranks[0] and ranks[0].word.is_final
    monkeypatch.setattr(watchdog, "_state", lambda _pid: "t")
    pass_seconds(board, ranks, 100, {1, 2})
    assert judge(ranks) is None


def test_whoever_waits_for_a_debugged_process_is_not_named_either(board, ranks, monkeypatch):
    monkeypatch.setattr(watchdog, "_state", lambda _pid: "t")
    board.put(0, TASK, 7)
    board.put(1, TASK, 7)  # the debugger has come in the middle of a pass
    for _ in range(50):
        pass_seconds(board, ranks, 1, {0, 2})
        assert judge(ranks) is None


@pytest.mark.parametrize(
    ("has_http", "main_pid", "expected"), [(True, 4711, "killed"), (True, 1, "ended"), (False, 4711, "ended")]
)
def test_what_a_child_does_about_a_main_process_that_stands_still(board, monkeypatch, has_http, main_pid, expected):
    args = ServerArgs(model_path="m", port=1 if has_http else 0)
    config = SimpleNamespace(parent_pid=main_pid, make_server_args=lambda: args)
    done = []
    monkeypatch.setattr(watchdog.os, "getppid", lambda: main_pid)
    monkeypatch.setattr(watchdog.os, "kill", lambda pid, _number: done.append(("killed", pid)))
    monkeypatch.setattr(watchdog.os, "_exit", lambda _code: done.append(("ended", main_pid)))
    monkeypatch.setattr(watchdog, "_state", lambda _pid: "T")
    monkeypatch.setattr(watchdog.logging, "shutdown", lambda: None)
    watch = LauncherWatch(board, config, LIMITS, 2.0)
    board.put(0, SERVES, 1)
    for _ in range(14):
        watch.look(1.0)
    assert done == []
    for _ in range(5):
        watch.look(1.0)
    assert done == [(expected, main_pid)], "once"


def test_a_suspended_host_is_nobody_s_standstill(monkeypatch):
    ticks = Ticks(0.001)
    now = time.monotonic()
    monkeypatch.setattr("ramet.srt.managers.pulse.time.monotonic", lambda: now + 3600.0)
    assert ticks.wait() == pytest.approx(0.002)
    ticks.stop()
    assert ticks.wait() == 0.0


def test_a_rank_sees_whether_the_main_process_beats(board, monkeypatch):
    """However seldom or often it looks, and after a pause as before."""
    now = 100.0
    monkeypatch.setattr("ramet.srt.managers.pulse.time.monotonic", lambda: now)
    launcher = LauncherBeats(board, PERIOD_S)
    board.put(MAIN_SLOT, BEATS, 7)
    assert launcher.move()
    seen = []
    for _ in range(8):
        now += 0.5
        seen.append(launcher.move())
    assert seen == [True] * 4 + [False] * 4
    board.put(MAIN_SLOT, BEATS, 8)
    assert launcher.move()
    now += 30.0
    assert not launcher.move()


def test_words_pass_over_the_board(board):
    voice = BoardVoice(PulseBoard(board.fd), slot=2)
    assert voice.own_word() is None
    word = Word("the scheduler (rank 3), process 4 on node 1, has not moved – ü", is_final=True)
    board.put_word(OWN_WORD, word)
    assert voice.own_word() == word
    voice.hear(Word("x" * 5000))
    assert set(board.word(HEARD_WORD).text) == {"x"} and not board.word(HEARD_WORD).is_final
    voice.hear(None)
    assert board.word(HEARD_WORD) is None
    assert not voice.is_told_to_end()
    board.put(MAIN_SLOT, END, 1)
    voice.hear_end(3)
    assert voice.is_told_to_end() and board.get(2, END) == 3


def test_the_limits_leave_time_for_the_end():
    for timeout_s in (0.4, 4.0, 300.0, 3600.0):
        limits = WatchLimits(timeout_s)
        assert 0 < limits.period_s < limits.doubt_s < limits.still_s < timeout_s
        assert limits.long_task_s < timeout_s


def test_a_process_s_state_is_read_from_the_kernel():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        os.kill(process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        assert watchdog._state(process.pid) == "T" and len(watchdog._work_done(process.pid)) == 3
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
    assert not Path(f"/proc/{process.pid}").exists() and watchdog._state(process.pid) == ""


def test_an_event_loop_that_hangs_ends_the_main_process(monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    args = ServerArgs(model_path="m", port=1, watchdog_timeout=20.0)
    watch = ChildWatch(args, lambda: ended.append("children"))
    try:
        watch.loop_turned()
        for _ in range(2):
            watch.loop_seen(19.0)
        assert ended == []
        watch.loop_turned()
        watch.loop_seen(19.0)
        watch.loop_seen(19.0)
        assert ended == []
        watch.loop_seen(2.0)
        assert ended == ["children", watchdog.HUNG_EXIT_CODE]
        assert f"the main process, process {os.getpid()} on node 0, has been at one turn" in watch.verdict
        watch.loop_ends()
        watch.loop_seen(99.0)
        assert len(ended) == 2
    finally:
        watch.stop()
