"""Owns what constraints may take of processors, time and memory, and how far each is. It ends none itself."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from ramet.srt.managers.grammar_link import GrammarLink
from ramet.srt.managers.request_grammar import RequestGrammar
from ramet.srt.sampling.constraint import Constraint

SLICE_CPU_S = 0.1  # of compiling, before others that wait have their turn
COMPILE_CPU_S = 10.0
COMPILE_WALL_S = 60.0  # from a request's arrival on
HANDICAP_S = 5e-6  # for each byte: a short constraint is compiled before a long one that came a little earlier
HELLO_WALL_S = 30.0  # in which the nursery has a process for a constraint, its own start included
STEP_CPU_S = 1.0
STEP_WALL_S = 30.0
NICE_CPU_S = 0.02  # from here on a process gives way to others
COMPILE_NICENESS, SLOW_NICENESS = 10, 19  # while it compiles; for the rest of its life, when it has been slow
MAX_TOTAL_BYTES = 4 << 30  # of all processes
CHECK_PERIOD_S = 0.02
MEMORY_PERIOD_S = 1.0


class Stage(Enum):
    """How far a constraint is."""

    QUEUED = "has no process"
    COMPILING = "is being compiled"
    COMPILED = "answers"
    FAILED = "can't be compiled"


class Holder:
    """One constraint and the requests that use it."""

    def __init__(self, constraint: Constraint, now: float):
        self.constraint = constraint
        self.stage = Stage.QUEUED
        self.link: GrammarLink | None = None
        self.grammars: dict[int, RequestGrammar] = {}
        self.queued_at = now
        self.turn = now + HANDICAP_S * len(constraint.text)
        self.is_overdue = False  # has had its slice
        self.num_restarts = 0
        self.used_at = now


class Excess(Enum):
    """What is at its end."""

    SLICE = "the turn of a constraint that is compiled"
    CONSTRAINT = "every request with it"
    STEP = "the request that it computes for"
    NURSERY = "the process from which others are forked"


@dataclass(frozen=True)
class Verdict:
    """What somebody has to end, and why."""

    excess: Excess
    reason: str = ""
    status_code: int = 400


def judge_compiling(holder: Holder, now: float) -> Verdict | None:
    """Hold a constraint to its limits that is not compiled yet; one that computes for a while gives way to others."""
    link = holder.link
    if link is not None and not link.has_begun and now - link.waiting_since > HELLO_WALL_S:
        return Verdict(Excess.NURSERY, f"it has not moved for {HELLO_WALL_S:g} s")
    used_s = 0.0 if link is None else link.cpu_s()
    if used_s > COMPILE_CPU_S:
        return Verdict(Excess.CONSTRAINT, f"compiling it takes more than {COMPILE_CPU_S:g} s")
    if now - holder.queued_at > COMPILE_WALL_S:
        text = f"not compiled within {COMPILE_WALL_S:g} s; the instance is busy with other constraints"
        return Verdict(Excess.CONSTRAINT, text, 503)
    if used_s > SLICE_CPU_S and not holder.is_overdue:
        return Verdict(Excess.SLICE)
    if used_s > NICE_CPU_S and link is not None:
        link.lower_priority(COMPILE_NICENESS)
    return None


def judge_step(link: GrammarLink, now: float) -> Verdict | None:
    """Hold a process to its limits that computes what may follow a token; a slow one gives way to others."""
    if now - link.waiting_since < CHECK_PERIOD_S:
        return None
    used_s = link.cpu_s()
    if used_s > NICE_CPU_S:
        link.lower_priority(SLOW_NICENESS)
    if used_s > STEP_CPU_S or now - link.waiting_since > STEP_WALL_S:
        return Verdict(Excess.STEP, f"one token takes more than {STEP_CPU_S:g} s of computing")
    return None


def too_large(holders: Iterable[Holder]) -> list[tuple[Holder, int]]:
    """Those to end, the largest, while all have too much memory together; first what nobody uses. With their bytes."""
    sizes = {holder: holder.link.memory_bytes() for holder in holders if holder.link is not None}
    left, found = sum(sizes.values()), []
    for holder in sorted(sizes, key=lambda holder: (bool(holder.grammars), -sizes[holder])):
        if left <= MAX_TOTAL_BYTES:
            break
        left -= sizes[holder]
        found.append((holder, sizes[holder]))
    return found
