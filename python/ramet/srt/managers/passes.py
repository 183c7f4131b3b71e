"""Owns the passes under way: from their plans, which every rank of the replica gets, to their results, oldest first.

Where the results come from decides what may be planned ahead, so there are two kinds: without a pipeline this rank
chooses the tokens, and in one the last stage's first rank does.
"""

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ramet.srt.batch.batch_plan import BatchPlan, BatchResult
from ramet.srt.managers.late_planning import LatePlanning
from ramet.srt.managers.plan_channel import PlanMessage, PlanSender
from ramet.srt.managers.rank_profiler import Wait
from ramet.srt.managers.schedule_batch import RunningReq, ScheduleBatch
from ramet.srt.managers.tp_worker import TpModelWorker

RESULT_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class FinishedPass:
    """A pass that was computed."""

    batch: ScheduleBatch
    plan: BatchPlan
    result: BatchResult
    seconds: float  # that it took: from its launch or, if that was later, the end of the pass before it


class Passes(ABC):
    """The ranks run passes in the order in which they are launched.

    Args:
        tell: hands a message to the replica's other ranks, if it has any.
        clock: gives the time in seconds.
    """

    max_under_way: int

    def __init__(self, worker: TpModelWorker, tell: Callable[[PlanMessage], None], clock: Callable[[], float]):
        self._worker = worker
        self.tell = tell
        self._clock = clock
        self._launch_times: deque[float] = deque()  # of the passes that have not come back
        self._planning_since: float | None = None  # unless the host has waited for a result since then
        self._last_end = 0.0  # when the last one came that has

    def __len__(self) -> int:
        """Passes whose results have not been dealt with."""
        return len(self._launch_times)

    @property
    def waiting_since(self) -> float | None:
        """The time since which the ranks can have been at the oldest pass under way; None if there is none.

        They begin it when it is launched and the one before it has ended. Any thread may ask.
        """
        times = list(self._launch_times)
        return max(times[0], self._last_end) if times else None

    def _came_back(self) -> float:
        """The oldest pass under way has ended; the seconds that it took."""
        begin = max(self._launch_times.popleft(), self._last_end)
        self._last_end = self._clock()
        return self._last_end - begin

    @property
    def has_room(self) -> bool:
        """Whether one more may be launched."""
        return len(self._launch_times) < self.max_under_way

    def spare_s(self) -> float:
        """Seconds for which planning the next one can wait without a loss; 0.0 if it is time."""
        return 0.0

    def begin_planning(self) -> None:
        """What is planned from now on is the next one."""
        self._planning_since = self._clock()

    def launch(self, batch: ScheduleBatch, plan: BatchPlan) -> None:
        """Queue a pass on every rank of the replica."""
        self._launch_times.append(self._clock())
        self.tell(plan)
        self._launch_here(batch, plan)

    @abstractmethod
    def _launch_here(self, batch: ScheduleBatch, plan: BatchPlan) -> None:
        """Queue this rank's part."""

    @abstractmethod
    def results(self, has_launched: bool) -> Iterator[FinishedPass]:
        """The passes that are to be dealt with now, when another one has just been launched, or none could be."""

    @abstractmethod
    def settle(self) -> Iterator[FinishedPass]:
        """The passes that must be dealt with before anything is planned that depends on their tokens."""

    @abstractmethod
    def drain(self) -> Iterator[FinishedPass]:
        """All passes under way, waiting for each: what comes after them finds the ranks at rest."""

    @abstractmethod
    def decodable(self, running: Sequence[RunningReq]) -> list[RunningReq]:
        """Which of the running requests the next pass may give a token."""


class LocalPasses(Passes):
    """Passes whose tokens this rank chooses.

    With `overlap`, one stays under way while the next is planned: the ranks take its input from their own memory. What
    ends a request is then seen one pass late, and the token too many is dropped. The next is planned as late as it can.
    """

    max_under_way = 2

    def __init__(
        self, worker: TpModelWorker, tell: Callable[[PlanMessage], None], clock: Callable[[], float], overlap: bool
    ):
        super().__init__(worker, tell, clock)
        self._num_kept = 1 if overlap else 0
        self._under_way: deque[tuple[ScheduleBatch, BatchPlan, Wait]] = deque()
        self._late_planning = LatePlanning()

    def spare_s(self) -> float:
        begin = self.waiting_since
        if begin is None or len(self) != self._num_kept:
            return 0.0
        batch = self._under_way[0][0]
        return self._late_planning.spare_s(batch.num_tokens, batch.num_prompt_tokens, self._clock() - begin)

    def _launch_here(self, batch: ScheduleBatch, plan: BatchPlan) -> None:
        self._under_way.append((batch, plan, self._worker.launch_for_result(plan)))
        host_s = None if self._planning_since is None else self._clock() - self._planning_since
        self._planning_since = None
        self._late_planning.launched(batch.num_tokens, batch.num_prompt_tokens, host_s, is_first=len(self) == 1)

    def results(self, has_launched: bool) -> Iterator[FinishedPass]:
        return self._wait_for_all_but(self._num_kept if has_launched else 0)

    def settle(self) -> Iterator[FinishedPass]:
        return self._wait_for_all_but(0)

    def drain(self) -> Iterator[FinishedPass]:
        return self._wait_for_all_but(0)

    def _wait_for_all_but(self, num_kept: int) -> Iterator[FinishedPass]:
        while len(self._under_way) > num_kept:
            batch, plan, wait = self._under_way.popleft()
            asked = self._clock()
            result = wait()
            seconds, self._planning_since = self._came_back(), None
            self._late_planning.came_back(batch.num_tokens, batch.num_prompt_tokens, seconds, self._last_end - asked)
            yield FinishedPass(batch, plan, result, seconds)

    def decodable(self, running: Sequence[RunningReq]) -> list[RunningReq]:
        """All but those that end with the pass under way, or whose constraint has yet to take a token."""
        return [
            one for one in running if one.num_remaining_tokens > 0 and (one.num_pending == 0 or one.req.grammar is None)
        ]


class PipelinePasses(Passes):
    """Passes whose results the last pipeline stage sends: as many as there are stages, each for other requests.

    A request is in one of them at a time, so its tokens are always known when it is planned again.
    """

    def __init__(self, worker: TpModelWorker, plan_sender: PlanSender, clock: Callable[[], float], num_stages: int):
        super().__init__(worker, plan_sender.send, clock)
        self.max_under_way = num_stages
        self._receive = plan_sender.receive
        self._under_way: deque[tuple[ScheduleBatch, BatchPlan]] = deque()

    def _launch_here(self, batch: ScheduleBatch, plan: BatchPlan) -> None:
        self._under_way.append((batch, plan))
        self._worker.launch(plan)

    def results(self, has_launched: bool) -> Iterator[FinishedPass]:
        """The next one, if it comes soon; at once if there is a pass to plan meanwhile."""
        if self._under_way:
            result = self._receive(0.0 if has_launched else RESULT_POLL_S)
            if result is not None:
                batch, plan = self._under_way.popleft()
                yield FinishedPass(batch, plan, result, self._came_back())

    def settle(self) -> Iterator[FinishedPass]:
        return iter(())

    def drain(self) -> Iterator[FinishedPass]:
        while self._under_way:
            yield from self.results(has_launched=False)

    def decodable(self, running: Sequence[RunningReq]) -> list[RunningReq]:
        """One micro-batch of those that no pass under way computes."""
        ready = [req for req in running if req.num_pending == 0]
        return ready[: -(-len(running) // self.max_under_way)]


def make_passes(
    worker: TpModelWorker,
    plan_sender: PlanSender | None,
    num_stages: int,
    overlap: bool,
    clock: Callable[[], float] = time.monotonic,
) -> Passes:
    """The kind that a replica needs.

    Args:
        plan_sender: to the replica's other ranks; None if it has only this one.
    """
    if plan_sender is None:
        return LocalPasses(worker, _tell_nobody, clock, overlap)
    if num_stages == 1:
        return LocalPasses(worker, plan_sender.send, clock, overlap)
    return PipelinePasses(worker, plan_sender, clock, num_stages)


def _tell_nobody(_message: PlanMessage) -> None:
    """For a replica of one rank."""
