"""Owns the judgement of whether a process moves, from its beats on the node's board, and a child's of the main process.

The main process's judgement of its children, and what comes of it, is entrypoints/child_watch.py.
"""

import logging
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ramet.srt.distributed.words import PULSE_PERIOD_S, Word
from ramet.srt.managers.child_process import ChildConfig
from ramet.srt.managers.pulse import (
    BEATS,
    LATE_PERIODS,
    MAIN_SLOT,
    OWN_WORD,
    SERVES,
    TASK,
    Pulse,
    PulseBoard,
    WatchLimits,
)

logger = logging.getLogger(__name__)

HUNG_EXIT_CODE = 70
TELL_NODES_S = 2.5 * PULSE_PERIOD_S  # for the other nodes to hear a word
STATES = {"T": "it is stopped by a signal", "D": "it waits for a device", "R": "it holds Python's lock"}
TRACED = "t"
GONE = ("", "X", "Z")
INIT_PID = 1  # of a container's first process, which nothing inside of the container can kill: pid_namespaces(7)


class Stillness:
    """For how many seconds a value has been the same, as its watcher counts them."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._value: object = None

    def see(self, value: object, step_s: float) -> None:
        if value == self._value:
            self.seconds += step_s
        else:
            self._value, self.seconds = value, 0.0

    def reset(self) -> None:
        self.seconds = 0.0

    def cap(self, seconds: float) -> None:
        self.seconds = min(self.seconds, seconds)


@dataclass
class Watched:
    """A process, as its beats show it.

    Args:
        title: names it in a sentence: "the detokenizer, process 12,".
    """

    title: str
    pid: int
    slot: int
    limits: WatchLimits
    _beats: Stillness = field(default_factory=Stillness)
    _task: Stillness = field(default_factory=Stillness)

    def look(self, board: PulseBoard, step_s: float) -> None:
        """Compare with the last look, `step_s` ago."""
        sign: object = board.get(self.slot, BEATS)
        if not board.get(self.slot, SERVES):
            sign = sign, _work_done(self.pid)  # an import may hold Python's lock for long
        self._beats.see(sign, step_s)
        task = board.get(self.slot, TASK)
        self._task.see(task, step_s)
        if task == 0:
            self._task.reset()
        if self._beats.seconds > self.limits.doubt_s and _state(self.pid) in (TRACED, *GONE):
            # A debugger holds it, or whoever waits for its end says how it came. It is late: who waits for it is not
            # to blame.
            self._beats.cap(self.limits.doubt_s)
            self._task.reset()

    @property
    def still_s(self) -> float:
        """Without a sign of life, from where that gives cause for doubt; 0 before."""
        return self._beats.seconds if self._beats.seconds > self.limits.doubt_s else 0.0

    @property
    def task_s(self) -> float:
        """In one task, from where that gives cause for doubt; 0 before."""
        return self._task.seconds if self._task.seconds > self.limits.long_task_s else 0.0

    @property
    def is_late(self) -> bool:
        """Whether it has missed some beats."""
        return self._beats.seconds > LATE_PERIODS * self.limits.period_s

    @property
    def word(self) -> Word | None:
        """What there is to say about it; None if it moves."""
        limits, flag = self.limits, f"(--watchdog-timeout {self.limits.timeout_s:g})"
        if self.still_s:
            state = STATES.get(_state(self.pid))
            line = f"{self.title} has not moved for {self.still_s:.3g} s {flag}{'' if state is None else ': ' + state}"
            return Word(line, is_final=self.still_s >= limits.still_s)
        if self.task_s:
            line = f"{self.title} has been at one forward pass, or another task, for {self.task_s:.3g} s {flag}"
            return Word(line, is_final=self.task_s > limits.timeout_s)
        return None


def judge(processes: Sequence[Watched]) -> Watched | None:
    """The process that gives most cause for doubt; None if all move.

    Whoever waits for a process that stands still is not named: a pass that takes long is blamed on its rank only while
    all processes beat.
    """
    worst = max(processes, key=lambda one: (one.still_s, one.task_s), default=None)
    if worst is None or worst.word is None:
        return None
    if not worst.still_s and any(one.is_late for one in processes):
        return None  # whether it waits for that one shows soon
    return worst


class LauncherWatch:
    """A child's look at the main process, which can do nothing itself while it is stopped.

    The children of a server kill it: its clients' connections are cut then, the kernel ends the other ranks, and the
    detokenizer removes the sockets. The children of a program that uses Engine end themselves, and so do those of a
    container's first process.

    Args:
        delay_s: beyond the limit, so that children don't all do it at once.
    """

    def __init__(self, board: PulseBoard, config: ChildConfig, limits: WatchLimits, delay_s: float):
        args = config.make_server_args()
        self._board = board
        self._may_kill = args.has_http
        self._tells_nodes = args.nnodes > 1
        title = f"the main process, process {config.parent_pid} on node {args.node_rank},"
        self._main = Watched(title, config.parent_pid, MAIN_SLOT, limits)
        self._delay_s = delay_s
        self._has_spoken = False
        self._has_acted = False

    def look(self, step_s: float) -> None:
        main = self._main
        main.look(self._board, step_s)
        if main.still_s >= main.limits.still_s + self._delay_s:
            assert main.word is not None
            if not self._has_acted:
                self._has_acted = True
                self._act(main.word.text)
        elif self._tells_nodes and main.word is not None:
            self._has_spoken = True
            self._board.put_word(OWN_WORD, Word(main.word.text))
        elif self._has_spoken:
            self._has_spoken = False
            self._board.put_word(OWN_WORD, None)

    def _act(self, line: str) -> None:
        can_kill = self._may_kill and self._main.pid != INIT_PID
        logger.critical("%s; %s", line, "it is killed" if can_kill else "this process ends")
        if self._tells_nodes:
            self._board.put_word(OWN_WORD, Word(line, is_final=True))
            time.sleep(TELL_NODES_S)
        logging.shutdown()
        if not can_kill:
            os._exit(HUNG_EXIT_CODE)
        elif os.getppid() == self._main.pid:
            os.kill(self._main.pid, signal.SIGKILL)


def end_stopped_launcher(config: ChildConfig) -> None:
    """Kill a server's main process that is stopped: the instance ends, and it could not see that."""
    if config.make_server_args().has_http and os.getppid() == config.parent_pid and _state(config.parent_pid) == "T":
        os.kill(config.parent_pid, signal.SIGKILL)


def start_pulse(config: ChildConfig) -> tuple[Pulse, PulseBoard]:
    """Have this child process beat from now on, and watch its launcher."""
    board = PulseBoard(config.board_fd)
    board.close()
    limits = WatchLimits(config.make_server_args().watchdog_timeout)
    delay_s = 2 * limits.period_s * (config.slot - MAIN_SLOT - 1)
    look: Callable[[float], None] = LauncherWatch(board, config, limits, delay_s).look
    return Pulse(board, config.slot, limits.period_s, look).start(), board


def _state(pid: int) -> str:
    """proc_pid_stat(5)'s letter for what a process is at; "" if there is none."""
    fields = _stat(pid)
    return fields[0] if fields else ""


def _work_done(pid: int) -> tuple[str, ...]:
    """What a process has used so far: processor time, and pages that were read for it."""
    fields = _stat(pid)
    return (fields[9], fields[11], fields[12]) if fields else ()


def _stat(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []
