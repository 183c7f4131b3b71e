"""Owns the requests whose constraint is being compiled, which processes do: they wait here before they can run."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ramet.srt.managers.grammar_pool import GrammarPool
from ramet.srt.managers.io_struct import TokenizedGenerateReqInput
from ramet.srt.managers.request_grammar import GrammarFailure, RequestGrammar
from ramet.srt.managers.schedule_batch import Req
from ramet.srt.sampling.constraint import Constraint


@dataclass(frozen=True, eq=False)
class CompilingReq:
    """A request that can't run yet."""

    message: TokenizedGenerateReqInput
    sampling_seed: int
    group: int
    grammar: RequestGrammar
    arrival_s: float  # on the scheduler's clock


@dataclass(frozen=True, eq=False)
class UnusableGrammar:
    """A request whose constraint can't be compiled."""

    message: TokenizedGenerateReqInput
    param: str
    reason: GrammarFailure


class GrammarQueue:
    """Where the passes of others go on meanwhile.

    Args:
        pool: None refuses every constraint.
    """

    def __init__(self, pool: GrammarPool | None):
        self._pool = pool
        self._compiling: list[CompilingReq] = []

    def __len__(self) -> int:
        return len(self._compiling)

    def groups(self) -> Iterator[int]:
        """The attention group of each request."""
        return (compiling.group for compiling in self._compiling)

    def since_s(self) -> Iterator[float]:
        """When each request came."""
        return (compiling.arrival_s for compiling in self._compiling)

    def put(
        self,
        message: TokenizedGenerateReqInput,
        constraint: Constraint,
        sampling_seed: int,
        group: int,
        arrival_s: float,
    ) -> None:
        """Begin to compile a request's constraint.

        Raises:
            ValueError: if constrained output is off.
        """
        if self._pool is None:
            raise ValueError("constrained output is off (--grammar-backend none)")
        self._compiling.append(CompilingReq(message, sampling_seed, group, self._pool.open(constraint), arrival_s))

    def collect(self) -> list[Req | UnusableGrammar]:
        """Remove and return those that are compiled, or can't be, in the order in which they came."""
        if not self._compiling:
            return []
        done = [compiling for compiling in self._compiling if not compiling.grammar.is_busy]
        if done:
            self._compiling = [compiling for compiling in self._compiling if compiling.grammar.is_busy]
        return [_outcome(compiling) for compiling in done]

    def take_out(self, is_meant: Callable[[str], bool]) -> list[CompilingReq]:
        """Remove and return the requests whose ids are meant. What only they want is compiled no further."""
        found = [compiling for compiling in self._compiling if is_meant(compiling.message.rid)]
        for compiling in found:
            compiling.grammar.close()
            self._compiling.remove(compiling)
        return found

    def wait(self, timeout_s: float) -> None:
        """Wait until all are compiled, but not longer than `timeout_s`."""
        if self._pool is not None:
            self._pool.wait([compiling.grammar for compiling in self._compiling], timeout_s)


def _outcome(compiling: CompilingReq) -> Req | UnusableGrammar:
    grammar = compiling.grammar
    if grammar.failure is not None:
        return UnusableGrammar(compiling.message, grammar.constraint.name, grammar.failure)
    req = Req(compiling.message, compiling.sampling_seed, compiling.group, grammar)
    req.arrival_s = compiling.arrival_s
    return req
