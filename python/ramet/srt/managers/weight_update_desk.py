"""Owns what a replica's leader does while the weights change: all its ranks take each step between the same two passes.

Staging, ending or renewing the offer to other instances, and memory that goes and comes, are steps beside the passes,
on each rank in a thread. They are answered when every rank of the replica has told its outcome. A switch is a pause:
the passes under way are finished, all ranks exchange their content, and the next pass is planned when all have.
"""

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol

from ramet.srt.model_executor.step_outcome import StepOutcome
from ramet.srt.model_executor.weight_update import RankVersions
from ramet.srt.weights.memory_messages import MemoryStep, ReleaseMemoryReq
from ramet.srt.weights.update_messages import (
    DropWeightsReq,
    JoinGroupReq,
    LeaveGroupReq,
    LongWeightStep,
    SwitchWeightsReq,
    WeightStep,
    WeightStepOutput,
)

logger = logging.getLogger(__name__)


class Passing(Protocol):
    """The scheduler, as far as a switch needs it."""

    @property
    def num_unfinished(self) -> int: ...

    @property
    def is_paused(self) -> bool: ...

    def give_up_caches(self) -> bool: ...

    def finish_passes(self) -> None: ...

    def switch_weight_version(self, version: str, /) -> None: ...


class WeightUpdateDesk:
    """The leader's side.

    Args:
        versions: of this rank.
        tell: hands a message to the replica's other ranks.
        reply: answers the main process.
    """

    def __init__(
        self,
        scheduler: Passing,
        versions: RankVersions,
        tell: Callable[[WeightStep | MemoryStep], None],
        reply: Callable[[WeightStepOutput], None],
    ):
        self._scheduler = scheduler
        self._versions = versions
        self._tell = tell
        self._reply = reply
        self._asked: list[str] = []  # ids of the requests whose step goes on: none or one
        self._joining: dict[str, Future[StepOutcome]] = {}  # by the id of the request

    @property
    def is_busy(self) -> bool:
        """Whether a step goes on beside the passes."""
        return bool(self._asked)

    @property
    def is_joining(self) -> bool:
        """Whether a trainer is waited for, which may take minutes."""
        return bool(self._joining)

    def handle(self, step: WeightStep | MemoryStep) -> None:
        """Do what the main process asks for; what goes on beside passes is answered by `poll`."""
        match step:
            case SwitchWeightsReq():
                self._switch(step)
            case DropWeightsReq():
                self._tell(step)
                self._versions.drop(step.number)
                self._reply(WeightStepOutput(request_id=step.request_id, success=True))
            case JoinGroupReq():
                self._tell(step)
                self._joining[step.request_id] = self._versions.join(step)
            case LeaveGroupReq():
                self._tell(step)
                self._versions.feeds.groups.leave(step.name, step.number)
                self._reply(WeightStepOutput(request_id=step.request_id, success=True))
            case _:
                if (obstacle := self._obstacle(step)) is not None:
                    self._reply(WeightStepOutput(request_id=step.request_id, success=False, message=obstacle))
                    return
                self._tell(step)
                self._versions.begin(step)
                self._asked.append(step.request_id)

    def _obstacle(self, step: LongWeightStep | MemoryStep) -> str | None:
        """Why a step can't be begun now; None if it can."""
        if self._asked:
            return "another step of an update has not ended yet"
        if isinstance(step, ReleaseMemoryReq):
            if not self._scheduler.is_paused:
                return "memory is given back in a pause alone"
            if "kv_cache" in step.tags and not self._scheduler.give_up_caches():
                return "requests hold keys and values"
        return None

    def poll(self) -> None:
        """Answer what has ended."""
        if self._asked and not self._versions.is_busy:
            self._answer(self._asked.pop(), self._versions.outcome())
        for request_id in [one for one, joining in self._joining.items() if joining.done()]:
            self._answer(request_id, self._joining.pop(request_id).result())

    def _answer(self, request_id: str, outcome: StepOutcome) -> None:
        output = WeightStepOutput(
            request_id=request_id,
            success=not outcome.failure,
            message=outcome.failure,
            source="+".join(outcome.sources),
            num_bytes=outcome.num_bytes,
            seconds=outcome.seconds,
            transfer_s=outcome.transfer_s,
            in_host_memory=outcome.in_host_memory,
            lacks_memory=outcome.lacks_memory,
            lacks=outcome.lacks,
            received=outcome.received,
        )
        self._reply(output)

    def _switch(self, step: SwitchWeightsReq) -> None:
        scheduler = self._scheduler
        scheduler.finish_passes()
        start = time.perf_counter()
        self._tell(step)
        self._versions.switch(step.number, step.version)
        scheduler.switch_weight_version(step.version)
        pause_s = time.perf_counter() - start
        logger.info("the weights are those of version %s now, after a pause of %.4f s", step.version, pause_s)
        self._reply(
            WeightStepOutput(
                request_id=step.request_id, success=True, pause_s=pause_s, num_reqs=scheduler.num_unfinished
            )
        )
