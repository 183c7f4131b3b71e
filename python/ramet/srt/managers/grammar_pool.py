"""Owns the constraints that are in use: a process for each, and whose turn it is to be compiled.

A process that crashes or takes too much costs the request for which it was computing. Others with the same constraint
go on in a new one. Nothing here waits, but for `poll` and `wait`, which say how long.
"""

import logging
import os
import select
import time
from collections.abc import Callable, Iterable, Sequence

from ramet.srt.configs.model_config import ModelConfig
from ramet.srt.managers import grammar_limits as limits
from ramet.srt.managers.grammar_limits import Excess, Holder, Stage, Verdict
from ramet.srt.managers.grammar_link import GrammarLink, NurseryLink
from ramet.srt.managers.grammar_messages import Close, Compile, Hello, NurseryConfig, Open, State, Step
from ramet.srt.managers.request_grammar import RequestGrammar
from ramet.srt.sampling.constraint import Constraint

logger = logging.getLogger(__name__)

QUICK_SLOTS = 4  # constraints that are compiled side by side before they have had their slice
SLOW_SLOTS = 2  # and after it
MAX_PROCESSES = 128
MAX_IDLE = 16  # compiled constraints that nobody uses now
MAX_RESTARTS = 3


class GrammarPool:
    """Constraints, for one tokenizer.

    Args:
        find_tokenizer: its folder; called when the first constraint comes.
        vocab_size: the model's, which may be above the tokenizer's.
        eos_ids: the tokens that may end a complete output.
    """

    def __init__(self, find_tokenizer: Callable[[], str], vocab_size: int, eos_ids: Sequence[int]):
        if not eos_ids:
            raise ValueError("constrained output needs a model with an end-of-sequence token")
        self._find_tokenizer = find_tokenizer
        self._vocab_size = vocab_size
        self._eos_ids = list(eos_ids)
        self._nursery: NurseryLink | None = None
        self._poll: select.epoll | None = None
        self._holders: dict[Constraint, Holder] = {}
        self._links: dict[int, Holder] = {}  # by descriptor: those with a process
        self._queued: list[Holder] = []
        self._number = 0
        self._checked_at = self._measured_at = 0.0

    # -- What requests ask for

    def open(self, constraint: Constraint) -> RequestGrammar:
        """Begin a request. It is busy until the constraint is compiled and says what may come first."""
        self._number += 1
        grammar = RequestGrammar(self._number, constraint, self._step, self._close)
        holder = self._holders.get(constraint)
        if holder is None:
            holder = self._holders[constraint] = Holder(constraint, time.monotonic())
            self._queued.append(holder)
        holder.grammars[grammar.number] = grammar
        if holder.link is not None:
            holder.link.send(Open(grammar.number, []))
        return grammar

    def _step(self, grammar: RequestGrammar, token_id: int, wants_mask: bool) -> None:
        holder = self._holders[grammar.constraint]
        if holder.link is not None:
            grammar.num_awaited += 1
            holder.link.send(Step(grammar.number, token_id, wants_mask))
        # Without a process it is awaited to be opened again, with all of its tokens.

    def _close(self, grammar: RequestGrammar) -> None:
        holder = self._holders.get(grammar.constraint)
        if holder is None or holder.grammars.pop(grammar.number, None) is None:
            return
        grammar.num_awaited = 0
        if holder.grammars:
            if holder.link is not None:
                holder.link.send(Close(grammar.number))
        elif holder.stage is Stage.COMPILED and holder.link is not None and not holder.link.awaited:
            holder.link.send(Close(grammar.number))
            holder.used_at = time.monotonic()
            self._evict(MAX_PROCESSES)
        else:  # nobody wants what it is at
            self._drop(holder)

    # -- Time passes

    def poll(self, timeout_s: float) -> None:
        """Take in what the processes say, after waiting up to `timeout_s` for the first of it."""
        self._start_queued()
        if self._poll is None:
            return
        for holder in self._links.values():
            assert holder.link is not None
            holder.link.flush()
        for descriptor, _ in self._poll.poll(timeout_s):
            holder_or_none = self._links.get(descriptor)
            if holder_or_none is not None:
                self._read(holder_or_none)
            elif self._nursery is not None and descriptor == self._nursery.socket.fileno():
                self._check_nursery()
        self._check_limits()
        self._start_queued()

    def wait(self, grammars: Iterable[RequestGrammar], timeout_s: float) -> None:
        """Wait until none of the `grammars` is busy, but not longer than `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        waiting = [grammar for grammar in grammars if grammar.is_busy]
        while waiting:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return
            self.poll(min(left_s, limits.CHECK_PERIOD_S))
            waiting = [grammar for grammar in waiting if grammar.is_busy]

    def close(self) -> None:
        """End every process."""
        for holder in list(self._holders.values()):
            self._drop(holder)
        if self._nursery is not None:
            self._nursery.close()
            self._nursery = None
        if self._poll is not None:
            self._poll.close()
            self._poll = None

    # -- The processes

    def _start_queued(self) -> None:
        """Start those whose turn it is."""
        if not self._queued:
            return
        compiling = [holder for holder in self._links.values() if holder.stage is Stage.COMPILING]
        num_slow = sum(holder.is_overdue for holder in compiling)
        room = {False: QUICK_SLOTS - (len(compiling) - num_slow), True: SLOW_SLOTS - num_slow}
        if max(room.values()) <= 0:
            return
        for holder in sorted(self._queued, key=lambda holder: holder.turn):
            if room[holder.is_overdue] > 0:
                self._start(holder)
                if holder.stage is Stage.QUEUED and holder in self._queued:
                    return  # there can be no more now
                room[holder.is_overdue] -= 1

    def _start(self, holder: Holder) -> None:
        """Give a constraint a process, if there can be one now."""
        self._evict(MAX_PROCESSES - 1)
        if len(self._links) >= MAX_PROCESSES:
            return
        try:
            link = self._take_idle() or self._open_nursery().take()
        except (BlockingIOError, BrokenPipeError, ConnectionResetError):  # too much at once, or the nursery has ended
            return
        except (OSError, ValueError) as error:
            self._fail_all(holder, f"no process can be had for it ({error})", 503)
            return
        self._queued.remove(holder)
        holder.link, holder.stage = link, Stage.COMPILING
        self._links[link.socket.fileno()] = holder
        assert self._poll is not None
        if not link.is_watched:
            self._poll.register(link.socket.fileno(), select.EPOLLIN)
            link.is_watched = True
        if holder.is_overdue:
            link.lower_priority(limits.SLOW_NICENESS)
        link.send(Compile(holder.constraint))
        for grammar in holder.grammars.values():
            link.send(Open(grammar.number, grammar.token_ids))
        link.flush()

    def _take_idle(self) -> GrammarLink | None:
        """The process of the constraint that was not used for longest, if enough are kept."""
        idle = [holder for holder in self._links.values() if not holder.grammars]
        if len(idle) < MAX_IDLE:
            return None
        holder = min(idle, key=lambda holder: holder.used_at)
        link = holder.link
        if link is None or not link.is_reusable:
            return None
        del self._links[link.socket.fileno()], self._holders[holder.constraint]
        return link

    def _open_nursery(self) -> NurseryLink:
        """Raises OSError or ValueError if there can be none."""
        if self._nursery is None:
            self._nursery = NurseryLink(
                NurseryConfig(
                    tokenizer_path=self._find_tokenizer(),
                    vocab_size=self._vocab_size,
                    eos_ids=self._eos_ids,
                    parent_pid=os.getpid(),
                )
            )
            if self._poll is None:
                self._poll = select.epoll()
            self._poll.register(self._nursery.socket.fileno(), select.EPOLLIN)
        return self._nursery

    def _check_nursery(self) -> None:
        """See whether the nursery has ended."""
        assert self._nursery is not None
        if reason := self._nursery.last_words():
            self._end_nursery(reason)

    def _end_nursery(self, reason: str) -> None:
        """Give up the nursery. Its processes end too, and their constraints go on in new ones."""
        nursery = self._nursery
        assert nursery is not None and self._poll is not None
        self._poll.unregister(nursery.socket.fileno())
        nursery.close()
        self._nursery = None
        logger.warning("the process for constrained output has ended: %s", reason)
        for holder in list(self._holders.values()):
            if not nursery.has_forked:  # a new one would fare no better
                self._fail_all(holder, f"the grammar library can't be started ({reason})", 503)
            elif holder.link is not None:
                self._restart(holder)

    def _unlink(self, holder: Holder) -> None:
        """End a constraint's process."""
        if holder.link is not None:
            assert self._poll is not None
            del self._links[holder.link.socket.fileno()]
            self._poll.unregister(holder.link.socket.fileno())
            holder.link.close()
            holder.link = None

    def _drop(self, holder: Holder) -> None:
        """Forget a constraint that nobody uses."""
        self._unlink(holder)
        del self._holders[holder.constraint]
        if holder.stage is Stage.QUEUED:
            self._queued.remove(holder)

    def _evict(self, max_processes: int) -> None:
        """Drop constraints that nobody uses, the longest unused first, where there are too many of them or of all."""
        idle = [holder for holder in self._links.values() if not holder.grammars]
        num_too_many = max(0, len(idle) - MAX_IDLE, len(self._links) - max_processes)
        for holder in sorted(idle, key=lambda holder: holder.used_at)[:num_too_many]:
            self._drop(holder)

    def _restart(self, holder: Holder) -> None:
        """Go on in a new process with a constraint whose process has ended."""
        self._unlink(holder)
        if not holder.grammars:
            self._drop(holder)
            return
        holder.num_restarts += 1
        if holder.num_restarts > MAX_RESTARTS:
            self._fail_all(holder, "the grammar library fails again and again", 503)
            return
        holder.stage, holder.is_overdue = Stage.QUEUED, False
        holder.queued_at = holder.turn = time.monotonic()
        self._queued.append(holder)
        for grammar in holder.grammars.values():
            grammar.reopen()

    # -- What they say

    def _read(self, holder: Holder) -> None:
        link = holder.link
        assert link is not None
        try:
            for answer in link.read():
                if isinstance(answer, Hello):
                    continue
                self._take(holder, answer)
                if holder.link is not link:
                    return
        except EOFError:
            self._take_end(holder)

    def _take(self, holder: Holder, state: State) -> None:
        assert holder.link is not None
        holder.used_at = time.monotonic()
        if state.cpu_s > limits.NICE_CPU_S and holder.stage is Stage.COMPILED:
            holder.link.lower_priority(limits.SLOW_NICENESS)
        grammar = holder.grammars.get(state.sequence)
        if holder.stage is Stage.COMPILING:
            holder.stage = Stage.FAILED if state.error is not None else Stage.COMPILED
            self._open_nursery().make_ready()
        if grammar is None:
            return
        if state.error is not None:
            self._fail(grammar, state.error, 400)
            return
        grammar.take(state.mask, state.is_terminated, state.cpu_s)
        if grammar.cpu_left_s < 0:
            self._fail(grammar, "it takes too much computing for each token; a simpler one won't", 400)

    def _take_end(self, holder: Holder) -> None:
        """A process has ended by itself, or was killed by somebody else."""
        if self._nursery is not None:
            self._check_nursery()
        link = holder.link
        if link is None or self._nursery is None:  # it has ended with the nursery, which is no fault of its own
            return
        if self._nursery.is_ending:  # as this one does with it; that shows in a moment
            return
        reason = "the grammar library broke down over it, which is too deeply nested or takes too much memory"
        if not link.has_begun:
            self._fail_all(holder, "no process can be had for it", 503)
            return
        if holder.stage is not Stage.COMPILED:
            logger.warning("a %s ended the process that compiled it", holder.constraint.name)
            self._fail_all(holder, reason, 400)
            return
        logger.warning("a %s ended its process", holder.constraint.name)
        self._end_culprit(holder, reason)

    def _end_culprit(self, holder: Holder, reason: str) -> None:
        """End the request for which a process computes, and go on in another one with the rest."""
        assert holder.link is not None
        grammar = holder.grammars.pop(holder.link.awaited[0], None) if holder.link.awaited else None
        if grammar is not None:
            grammar.fail(reason, 400)
            holder.num_restarts -= 1  # with one request less it can't go on for ever
        self._restart(holder)

    def _fail(self, grammar: RequestGrammar, reason: str, status_code: int) -> None:
        grammar.fail(reason, status_code)
        self._close(grammar)

    def _fail_all(self, holder: Holder, reason: str, status_code: int) -> None:
        """End every request with a constraint, and forget that."""
        for grammar in holder.grammars.values():
            grammar.fail(reason, status_code)
        holder.grammars.clear()
        self._drop(holder)

    # -- What they may take

    def _check_limits(self) -> None:
        now = time.monotonic()
        if now - self._checked_at < limits.CHECK_PERIOD_S:
            return
        self._checked_at = now
        for holder in [*self._links.values(), *self._queued]:
            if holder.stage is not Stage.COMPILED:
                self._carry_out(holder, limits.judge_compiling(holder, now))
            elif holder.link is not None and holder.link.awaited:
                self._carry_out(holder, limits.judge_step(holder.link, now))
        if now - self._measured_at > limits.MEMORY_PERIOD_S:
            self._measured_at = now
            for holder, num_bytes in limits.too_large(self._links.values()):
                logger.warning("constraints take too much memory together; ended one of %d MiB", num_bytes >> 20)
                self._fail_all(holder, "the instance has no memory left for it", 503)

    def _carry_out(self, holder: Holder, verdict: Verdict | None) -> None:
        match verdict:
            case Verdict(Excess.NURSERY):
                self._end_nursery(verdict.reason)
            case Verdict(Excess.CONSTRAINT):
                self._fail_all(holder, verdict.reason, verdict.status_code)
            case Verdict(Excess.STEP):
                self._end_culprit(holder, verdict.reason)
            case Verdict(Excess.SLICE):
                self._end_slice(holder)

    def _end_slice(self, holder: Holder) -> None:
        """Let a constraint that takes its time make room for others."""
        assert holder.link is not None
        holder.is_overdue = True
        num_slow = sum(other.is_overdue and other.stage is Stage.COMPILING for other in self._links.values())
        if num_slow <= SLOW_SLOTS:
            holder.link.lower_priority(limits.SLOW_NICENESS)
            return
        self._unlink(holder)  # to begin anew when one of those is done
        holder.stage = Stage.QUEUED
        self._queued.append(holder)
        for grammar in holder.grammars.values():
            grammar.num_awaited = 1


def make_grammar_pool(name: str, find_tokenizer: Callable[[], str], model_config: ModelConfig) -> GrammarPool | None:
    """The pool for --grammar-backend; None if constrained output is off, or the model has no end token."""
    if name == "none" or not model_config.eos_token_ids:
        return None
    return GrammarPool(find_tokenizer, model_config.vocab_size, model_config.eos_token_ids)
