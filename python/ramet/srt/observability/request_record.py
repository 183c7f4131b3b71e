"""Owns what the code of one HTTP request knows of it wherever it is: its id, and what it has started."""

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any


@dataclass(eq=False, slots=True)
class RequestRecord:
    """One request from its first byte to its last."""

    request_id: str  # the caller's X-Request-Id, or one of our own
    method: str = "GET"  # and
    target: str = "/"  # path as the caller has it, with the names in its query
    is_given: bool = False  # whether it is the caller's, who may use it again
    is_over: bool = False  # answered: what still runs in its name, such as what was started for all, is not its own
    span: Any = None  # of a trace, where there are traces
    error: str | None = None  # what went wrong when the answer had begun
    # What is computed for it: the inputs (SequenceInput) and the Generation of each call.
    generations: list[tuple[Any, Any]] = field(default_factory=list)


_current: ContextVar[RequestRecord | None] = ContextVar("request", default=None)


def begin_request(record: RequestRecord) -> None:
    """What this task, and those that it starts, do from now on is for this request."""
    _current.set(record)


def current_request() -> RequestRecord | None:
    """The request that this task works for; None if it is for none."""
    return _current.get()
