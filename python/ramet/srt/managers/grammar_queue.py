"""Owns the requests whose constraint is being compiled: they wait here, while threads compile, before they can run."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from ramet.srt.managers.io_struct import TokenizedGenerateReqInput
from ramet.srt.managers.schedule_batch import Req
from ramet.srt.sampling.grammar import Grammar, GrammarBackend

COMPILE_THREADS = 2


@dataclass(frozen=True, eq=False)
class CompilingReq:
    """A request that can't run yet."""

    message: TokenizedGenerateReqInput
    sampling_seed: int
    group: int
    future: Future[Grammar | None]


@dataclass(frozen=True, eq=False)
class UnusableGrammar:
    """A request whose constraint can't be compiled."""

    message: TokenizedGenerateReqInput
    reason: str  # one line for the client


class GrammarQueue:
    """Compiles in threads, so that the passes of others go on.

    Args:
        backend: None refuses every constraint.
    """

    def __init__(self, backend: GrammarBackend | None):
        self._backend = backend
        self._threads = ThreadPoolExecutor(max_workers=COMPILE_THREADS, thread_name_prefix="grammar")
        self._compiling: list[CompilingReq] = []

    def __len__(self) -> int:
        return len(self._compiling)

    def groups(self) -> Iterator[int]:
        """The attention group of each request."""
        return (compiling.group for compiling in self._compiling)

    def put(self, message: TokenizedGenerateReqInput, sampling_seed: int, group: int) -> None:
        """Begin to compile a request's constraint.

        Raises:
            ValueError: if constrained output is off.
        """
        if self._backend is None:
            raise ValueError("constrained output is off (--grammar-backend none)")
        future = self._threads.submit(self._backend.compile, message.sampling_params)
        self._compiling.append(CompilingReq(message, sampling_seed, group, future))

    def collect(self) -> list[Req | UnusableGrammar]:
        """Remove and return those that are compiled, or can't be, in the order in which they came."""
        if not self._compiling:
            return []
        done = [compiling for compiling in self._compiling if compiling.future.done()]
        self._compiling = [compiling for compiling in self._compiling if compiling not in done]
        return [_outcome(compiling) for compiling in done]

    def take_out(self, is_meant: Callable[[str], bool]) -> list[TokenizedGenerateReqInput]:
        """Remove and return the requests whose ids are meant."""
        found = [compiling for compiling in self._compiling if is_meant(compiling.message.rid)]
        for compiling in found:
            compiling.future.cancel()
            self._compiling.remove(compiling)
        return [compiling.message for compiling in found]

    def wait(self, timeout_s: float) -> None:
        """Wait until all are compiled, but not longer than `timeout_s`."""
        wait([compiling.future for compiling in self._compiling], timeout=timeout_s)


def _outcome(compiling: CompilingReq) -> Req | UnusableGrammar:
    try:
        grammar = compiling.future.result()
    except ValueError as error:
        return UnusableGrammar(compiling.message, str(error))
    return Req(compiling.message, compiling.sampling_seed, compiling.group, grammar)
