"""Owns the processes that run the grammar library: `python -m ramet.srt.managers.grammar_process`, started on demand.

The first one, the nursery, reads the tokenizer and then does nothing but fork, one process for each constraint. Each
can crash, be killed or reach a limit by itself. managers/grammar_pool.py, in the scheduler, is the other side.
"""

import contextlib
import gc
import logging
import os
import resource
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable

import msgspec

from ramet.srt.managers.child_process import die_with_parent
from ramet.srt.managers.grammar_messages import (
    FORK,
    Close,
    Compile,
    FrameReader,
    Hello,
    NurseryConfig,
    Open,
    Order,
    State,
    Step,
    decode_order,
    frame,
)
from ramet.srt.sampling.grammar import Grammar, GrammarCompiler, GrammarError
from ramet.srt.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

MEMORY_BYTES = 1 << 30  # of address space that a process may take beyond what it is forked with
STACK_BYTES = 256 << 20  # the library recurses as deeply as the constraint is nested
NICENESS = 5  # the scheduler's passes come first
MAX_CPU_S = 24 * 3600  # a last resort: the scheduler counts each order's
REAP_PERIOD_S = 1.0
MAX_COMMAND_BYTES = 64


class GrammarProcess:
    """One constraint and the sequences that keep to it.

    Args:
        answer: called with each answer, in order.
    """

    def __init__(self, compiler: GrammarCompiler, answer: Callable[[State], None]):
        self._compiler = compiler
        self._answer = answer
        self._start: Grammar | None = None
        self._error: str | None = None
        self._sequences: dict[int, Grammar] = {}
        self._cpu_s = 0.0

    def handle(self, order: Order) -> None:
        """Do what the scheduler says."""
        match order:
            case Compile():
                self._compile(order)
            case Open():
                self._answer_with(order.sequence, lambda: self._open(order))
            case Step():
                self._answer_with(order.sequence, lambda: self._step(order))
            case Close():
                self._sequences.pop(order.sequence, None)

    def _compile(self, order: Compile) -> None:
        self._start, self._error = None, None
        self._sequences.clear()  # of the constraint that this process was there for before
        try:
            self._start = self._compiler.compile(order.constraint)
        except GrammarError as error:
            self._error = str(error)

    def _answer_with(self, sequence: int, work: Callable[[], State]) -> None:
        try:
            state = work()
        except GrammarError as error:
            state = State(sequence, 0.0, 0.0, error=str(error))
        state.total_cpu_s = time.process_time()
        state.cpu_s = state.total_cpu_s - self._cpu_s
        self._cpu_s = state.total_cpu_s
        self._answer(state)

    def _open(self, order: Open) -> State:
        if self._start is None:
            raise GrammarError(self._error or "nothing was compiled")
        grammar = self._start.copy()
        for token_id in order.token_ids:
            grammar.accept(token_id)
        self._sequences[order.sequence] = grammar
        return _state(order.sequence, grammar, True)

    def _step(self, order: Step) -> State:
        grammar = self._sequences[order.sequence]
        grammar.accept(order.token_id)
        return _state(order.sequence, grammar, order.wants_mask)


def _state(sequence: int, grammar: Grammar, wants_mask: bool) -> State:
    # The mask comes first: it is what finds out that nothing can follow.
    mask = grammar.mask() if wants_mask else b""
    return State(sequence, 0.0, 0.0, mask, grammar.is_terminated)


class Nursery:
    """Forks a process for each socket that it is sent.

    Args:
        control: SOCK_SEQPACKET, to the scheduler.
    """

    def __init__(self, compiler: GrammarCompiler, control: socket.socket):
        self._compiler = compiler
        self._control = control
        self._pids: set[int] = set()  # forked, and not reaped: so nobody else can have these ids

    def run(self) -> None:
        """Fork and kill until the scheduler has gone."""
        gc.collect()
        gc.freeze()  # what is never looked at stays shared
        selector = selectors.DefaultSelector()
        selector.register(self._control, selectors.EVENT_READ)
        while True:
            if selector.select(REAP_PERIOD_S):
                data, descriptors, _, _ = socket.recv_fds(self._control, MAX_COMMAND_BYTES, 1)
                if not data:
                    break
                self._handle(data, descriptors)
            self._reap()
        for pid in self._pids:
            os.kill(pid, signal.SIGKILL)

    def _handle(self, data: bytes, descriptors: list[int]) -> None:
        if data == FORK:
            try:
                pid = os.fork()
                if pid == 0:
                    self._become_child(socket.socket(fileno=descriptors[0]))
                self._pids.add(pid)
            except OSError as error:  # too many processes; that this one's socket closes tells the scheduler
                logger.warning("no process for a constraint: %s", error)
            finally:
                os.close(descriptors[0])
        elif int(data[1:]) in self._pids:
            os.kill(int(data[1:]), signal.SIGKILL)

    def _reap(self) -> None:
        while self._pids:
            pid, _ = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            self._pids.discard(pid)

    def _become_child(self, connection: socket.socket) -> None:
        """Serve one constraint, and end. Never returns."""
        try:
            parent_pid = os.getppid()
            die_with_parent(parent_pid)
            self._control.close()
            _limit_process()
            threading.stack_size(STACK_BYTES)
            thread = threading.Thread(target=_serve, args=(self._compiler, connection))
            thread.start()
            thread.join()
        finally:
            os._exit(0)  # no clean-up of what belongs to the nursery


def _limit_process() -> None:
    """Have the kernel bound what this process takes, and prefer every other one to it."""
    os.nice(NICENESS)
    with open("/proc/self/statm", encoding="ascii") as stream:
        mapped = int(stream.read().split()[0]) * resource.getpagesize()
    for what, limit in (
        (resource.RLIMIT_AS, mapped + STACK_BYTES + MEMORY_BYTES),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, MAX_CPU_S),
    ):
        hard = resource.getrlimit(what)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(what, (limit, hard))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as stream:
        stream.write("1000")  # the first to go when the host runs out of memory
    with open(os.devnull, "r+b") as nowhere:
        for descriptor in range(3):  # a panic's message may hold what a client sent
            os.dup2(nowhere.fileno(), descriptor)


def _serve(compiler: GrammarCompiler, connection: socket.socket) -> None:
    """Answer until the scheduler closes the connection."""
    connection.setblocking(True)
    process = GrammarProcess(compiler, lambda state: connection.sendall(frame(state)))
    reader = FrameReader()
    with contextlib.suppress(OSError):  # the scheduler has gone, or wants no more of this
        connection.sendall(frame(Hello(os.getpid(), threading.get_native_id())))
        while data := connection.recv(1 << 16):
            for message in reader.push(data):
                process.handle(decode_order(message))


def main() -> int:
    """Entry of the nursery. File descriptor 0 is its socket; the first message on it is a NurseryConfig."""
    control = socket.socket(fileno=os.dup(0))
    config = msgspec.json.decode(control.recv(1 << 16), type=NurseryConfig)
    die_with_parent(config.parent_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        compiler = GrammarCompiler(Tokenizer.from_path(config.tokenizer_path), config.vocab_size, config.eos_ids)
    except (ValueError, OSError, ImportError) as error:
        control.send(str(error).encode()[:1024])
        return 1
    Nursery(compiler, control).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
