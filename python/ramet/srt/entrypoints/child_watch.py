"""Owns the main process's watch over its node: each child has to move, and so has its own event loop.

What doesn't is killed with a line that names it; then the instance ends as it does whenever a child dies.
"""

import logging
import os
import threading
import time
from collections.abc import Callable

from ramet.srt.distributed.words import Word
from ramet.srt.managers.pulse import (
    BEATS,
    END,
    HEARD_WORD,
    MAIN_SLOT,
    OWN_WORD,
    SERVES,
    PulseBoard,
    Ticks,
    WatchLimits,
)
from ramet.srt.managers.watchdog import HUNG_EXIT_CODE, TELL_NODES_S, Stillness, Watched, judge
from ramet.srt.server_args import ServerArgs

logger = logging.getLogger(__name__)


class ChildWatch:
    """The thread that beats for the main process, and judges its children each time.

    Args:
        kill_all: ends every child at once.
    """

    def __init__(self, server_args: ServerArgs, kill_all: Callable[[], None]):
        args = server_args
        self.limits = WatchLimits(args.watchdog_timeout)
        self.board = PulseBoard.create(num_slots=2 + len(args.local_ranks))
        self._verdict: str | None = None
        self._node = args.node_rank
        self._tells_nodes = args.nnodes > 1
        self._is_server = args.has_http
        self._kill_all = kill_all
        self._kills: dict[int, Callable[[], None]] = {}
        self._processes: list[Watched] = []
        self._doubt: Word | None = None
        self._loop_turns: int | None = None  # of the event loop, from its beginning to its end
        self._loop = Stillness()
        self._is_judging = True
        self._on_asked: Callable[[int], None] | None = None
        self._ticks = Ticks(self.limits.period_s)
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def add(self, name: str, pid: int, slot: int, kill: Callable[[], None]) -> None:
        """A child that has been started; all are added before `start`."""
        self._processes.append(Watched(f"the {name}, process {pid} on node {self._node},", pid, slot, self.limits))
        self._kills[pid] = kill

    def start(self) -> None:
        self._thread.start()

    def serve(self, on_asked: Callable[[int], None] | None) -> None:
        """The instance is up: processor time of the main process is no sign of life any more.

        Args:
            on_asked: called once, on node 0, with the number of a node that was told to end, if there is one.
        """
        self.board.put(MAIN_SLOT, SERVES, 1)
        self._on_asked = on_asked

    def ask_for_end(self) -> None:
        """Let node 0 know that this node was told to end."""
        self.board.put(MAIN_SLOT, END, 1)

    def loop_turned(self) -> None:
        """To be called by the event loop in each period, from the first call on until `loop_ends`."""
        self._loop_turns = (self._loop_turns or 0) + 1

    def loop_ends(self) -> None:
        self._loop_turns = None

    def loop_seen(self, step_s: float) -> None:
        """Look whether the event loop has turned since the last look, `step_s` ago; end the process if it hangs."""
        self._loop.see(self._loop_turns, step_s)
        if self._loop_turns is None:
            self._loop.reset()
        elif self._is_judging and self._loop.seconds > self.limits.timeout_s:
            self._give_up_loop()

    @property
    def doubt(self) -> str | None:
        """A line about a process, on whatever node, that has not moved for a part of what it may; None if all move."""
        return None if self._doubt is None else self._doubt.text

    @property
    def verdict(self) -> str | None:
        """The line about what has ended the instance by not moving, here or on another node; None if nothing has."""
        heard = self.board.word(HEARD_WORD)
        return heard.text if self._verdict is None and heard is not None and heard.is_final else self._verdict

    def stop_judging(self) -> None:
        """The children are being ended. The main process beats on: they still look at it."""
        self._is_judging = False

    def stop(self) -> None:
        """All children have ended."""
        self._is_judging = False
        self._ticks.stop()
        self.board.close()

    def _run(self) -> None:
        beats = 0
        while (step_s := self._ticks.wait()) > 0.0:
            beats += 1
            self.board.put(MAIN_SLOT, BEATS, beats)
            for process in self._processes:
                process.look(self.board, step_s)
            self.loop_seen(step_s)
            self._hear_end()
            if self._is_judging:
                self._judge()

    def _hear_end(self) -> None:
        node = max((self.board.get(process.slot, END) for process in self._processes), default=0)
        if node > 0 and self._on_asked is not None:
            self._on_asked(node)
            self._on_asked = None

    def _judge(self) -> None:
        found = judge(self._processes)
        heard = self.board.word(HEARD_WORD)
        if heard is not None and heard.is_final:
            return  # the rank that has heard it ends
        if found is None or (heard is not None and not found.still_s):
            self._note(heard)  # if ours is at a long task, it waits for the one that the other node names
            return
        word = found.word
        assert word is not None
        if word.is_final:
            self._end(word, found)
        else:
            self._note(word, own=True)

    def _note(self, doubt: Word | None, own: bool = False) -> None:
        """Remember whom there is doubt about, and log it when it begins and when it ends."""
        if doubt is not None and self._doubt is None:
            logger.warning("%s", doubt.text)
        elif doubt is None and self._doubt is not None:
            logger.info("all processes move again")
        if self._tells_nodes and (own or self._doubt is not None):
            self.board.put_word(OWN_WORD, doubt if own else None)
        self._doubt = doubt

    def _end(self, word: Word, process: Watched) -> None:
        self._verdict = word.text
        self._is_judging = False
        self._doubt = word
        if self._tells_nodes:
            self.board.put_word(OWN_WORD, word)
            time.sleep(TELL_NODES_S)
        self._kills[process.pid]()

    def _give_up_loop(self) -> None:
        """The event loop, which would end the instance, is what does not move."""
        self._verdict = (
            f"the main process, process {os.getpid()} on node {self._node}, has been at one turn of its event loop for "
            f"{self._loop.seconds:.3g} s (--watchdog-timeout {self.limits.timeout_s:g})"
        )
        self._is_judging = False
        logger.critical("%s; giving up", self._verdict)
        self._kill_all()
        if self._is_server:
            logging.shutdown()
            os._exit(HUNG_EXIT_CODE)
