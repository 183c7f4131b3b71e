"""A scheduler in the test's own process that gives its memory back and takes it again."""

from ramet.srt.managers.io_struct import ContinueReqInput, PauseMode, PauseReqInput
from ramet.srt.model_loader.arena.base import WeightArena
from ramet.srt.weights.memory_messages import (
    MEMORY_TAGS,
    MemoryTag,
    ReleaseMemoryReq,
    ResumeMemoryReq,
    StartSource,
    WakeSource,
)
from ramet.srt.weights.update_messages import WeightStepOutput
from updated_engine import Updated

START: list[WakeSource] = [StartSource()]


class Sleeper(Updated):
    """A scheduler that is told to give its memory back, in a pause."""

    def pause(self, mode: PauseMode = "retract") -> None:
        self.engine.send(PauseReqInput(request_id="pause", mode=mode))
        self.engine.step()

    def release(self, *tags: MemoryTag, keeps_copy: bool = False) -> WeightStepOutput:
        step = ReleaseMemoryReq(request_id="sleep", tags=list(tags or MEMORY_TAGS), keeps_copy=keeps_copy)
        return self.ask(step)

    def resume(self, *tags: MemoryTag, sources: list[WakeSource] = START) -> WeightStepOutput:
        return self.ask(ResumeMemoryReq(request_id="wake", tags=list(tags or MEMORY_TAGS), sources=sources))

    def go_on(self) -> None:
        self.engine.send(ContinueReqInput(request_id="go on"))
        self.engine.step()

    @property
    def arena(self) -> WeightArena:
        return self.engine.runner.arena
