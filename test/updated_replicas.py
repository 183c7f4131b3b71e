"""Two replicas that are asked to change their weights, and may fail: stand-ins of what control talks to."""

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from ramet.srt.managers.io_struct import ContinueReqInput, ContinueReqOutput, PauseReqInput, PauseReqOutput
from ramet.srt.managers.update_report import UpdateReport
from ramet.srt.managers.weight_update_control import WeightUpdateControl
from ramet.srt.weights.memory_messages import MemoryStep, ReleaseMemoryReq, ResumeMemoryReq
from ramet.srt.weights.update_messages import (
    DropWeightsReq,
    FilesSource,
    OfferWeightsReq,
    PutTensorsReq,
    SealWeightsReq,
    StageWeightsReq,
    SwitchWeightsReq,
    WeightStepOutput,
)

NAMES = {
    StageWeightsReq: "stage",
    PutTensorsReq: "put",
    SealWeightsReq: "seal",
    SwitchWeightsReq: "switch",
    DropWeightsReq: "drop",
}


class Replicas:
    """Stands in for the tokenizer manager and the instance; notes what is asked of two replicas, and answers.

    Args:
        faults: what to answer with instead, by "step number": a reason of the second replica, or an exception.
    """

    def __init__(self, faults: dict[str, Any] | None = None) -> None:
        self.faults = faults or {}
        self.events: list[str] = []
        self.staged: set[int] = set()
        self.serving = 0
        self.gives_weights = True
        self.weight_version = "default"
        self.weights_refusal: str | None = None
        self.adapters = SimpleNamespace(names=list)
        self.ended = ""
        self.received = ["a", "a"]  # by the two replicas

    async def ask_all(self, question: Callable[..., Any], kind: Any, timeout_s: float) -> list[WeightStepOutput]:
        await asyncio.sleep(0)
        step = question(request_id="0")
        if isinstance(step, OfferWeightsReq):
            name = "offer" if step.is_offered else "withdraw"
        else:
            name = f"{NAMES[type(step)]} {step.number}"
        self.events.append(name)
        fault = self.faults.pop(name, "")
        if isinstance(fault, Exception):
            raise fault
        if isinstance(fault, WeightStepOutput):
            return [fault, fault]
        if not fault and isinstance(step, StageWeightsReq | SealWeightsReq):
            self.staged.add(step.number)
        elif not fault and isinstance(step, SwitchWeightsReq):
            self.staged.remove(step.number)
            self.staged.add(self.serving)
            self.serving = step.number
        elif isinstance(step, DropWeightsReq):
            self.staged.discard(step.number)
        if isinstance(step, SealWeightsReq):
            said = [WeightStepOutput(request_id="0", success=True, received=one) for one in self.received]
            return [*said, WeightStepOutput(request_id="1", success=False, message=fault)] if fault else said
        first = WeightStepOutput(request_id="0", success=True, num_bytes=10, source="checkpoint", pause_s=0.5)
        return [first, WeightStepOutput(request_id="1", success=not fault, message=fault, num_bytes=5, num_reqs=2)]

    def note_weight_version(self, version: str) -> None:
        self.weight_version = version

    def abort_all(self) -> None:
        self.events.append("abort")

    def close_for_weights(self, *, asleep: bool = False) -> None:  # noqa: ARG002
        self.events.append("close")

    def open_for_weights(self) -> None:
        self.events.append("open")

    def end(self, line: str) -> None:
        self.ended = line


class Sleepers(Replicas):
    """Two replicas whose memory goes and comes. A fault is the second one's."""

    def __init__(self) -> None:
        super().__init__()
        self.gone: list[set[str]] = [set(), set()]
        self.are_offered = [True, True]
        self.steps: list[MemoryStep] = []
        self.pause_refusal: str | None = None
        self.num_running = 0

    async def ask_all(self, question: Callable[..., Any], kind: Any, timeout_s: float = 10.0) -> list[Any]:
        step = question(request_id="0")
        if isinstance(step, PauseReqInput | ContinueReqInput):
            self.note(f"pause {step.mode}" if isinstance(step, PauseReqInput) else "go on")
            return [PauseReqOutput(request_id="0", num_held=0) if kind is PauseReqOutput else
                    ContinueReqOutput(request_id="0")] * 2  # fmt: skip
        if not isinstance(step, ReleaseMemoryReq | ResumeMemoryReq):
            replies = await super().ask_all(question, kind, timeout_s)
            if isinstance(step, OfferWeightsReq):
                self.are_offered = [step.is_offered, self.are_offered[1] if replies[1].message else step.is_offered]
            return replies
        fault = self.note("release" if isinstance(step, ReleaseMemoryReq) else "resume")
        self.steps.append(step)
        if any(self.are_offered):  # as ranks refuse
            failure = "weights that others may take can't be put away"
            return [WeightStepOutput(request_id="0", success=False, message=failure)] * 2
        for gone in self.gone[: 1 if fault else 2]:
            gone.symmetric_difference_update(set(step.tags) - gone if isinstance(step, ReleaseMemoryReq) else
                                             set(step.tags) & gone)  # fmt: skip
        reply = WeightStepOutput(request_id="0", success=True, num_bytes=10, source="checkpoint")
        return [reply, WeightStepOutput(request_id="1", success=not fault, message=fault, num_bytes=5)]

    def note(self, name: str) -> str:
        self.events.append(name)
        fault = self.faults.pop(name, "")
        if isinstance(fault, Exception):
            raise fault
        return fault

    async def wait_idle(self) -> None:
        self.events.append("idle")

    def take_events(self) -> list[str]:
        events, self.events = self.events, []
        return events


class Found:
    """Files, or an instance whose content changes so many times."""

    origin, model_path, source = "somewhere", "somewhere", FilesSource(path="somewhere")
    version: str | None = None

    def __init__(self, num_changes: int = 0) -> None:
        self.num_changes = num_changes

    def is_unchanged(self) -> bool:
        self.num_changes -= 1
        return self.num_changes < 0

    def end(self, *, has_it: bool) -> None:
        self.ends = [*getattr(self, "ends", []), has_it]


class Case:
    def __init__(self, num_kept: int = 1, **faults: Any) -> None:
        self.adapters_turn = asyncio.Lock()
        self.replicas = Replicas({name.replace("_", " "): fault for name, fault in faults.items()})
        manager: Any = self.replicas
        turn = asyncio.Lock()
        self.control = WeightUpdateControl(
            manager, "start", num_kept, self.replicas, self.replicas, turn, self.adapters_turn
        )

    def update(self, version: str | None = None, found: Any = None, **options: Any) -> UpdateReport:
        chosen = found or Found()
        return asyncio.run(self._alone(lambda: self.control.update(lambda: chosen, version, **options)))

    def rollback(self) -> UpdateReport:
        return asyncio.run(self._alone(self.control.rollback))

    def reset(self) -> UpdateReport:
        return asyncio.run(self._alone(self.control.reset))

    async def _alone(self, work: Any) -> UpdateReport:
        self.control._turn = asyncio.Lock()  # of this event loop
        return await work()

    def names(self) -> list[str]:
        """What serves, and what there is a way back to."""
        return [one.version for one in (self.control.current, *self.control.kept)]

    def take_events(self) -> list[str]:
        events = list(self.replicas.events)
        self.replicas.events.clear()
        return events
