"""A scheduler in the test's own process whose weights change."""

import pickle
from pathlib import Path
from typing import Any

import random_models as rm
from engine_harness import EngineHarness
from ramet.srt.model_loader.checkpoint.file_stamps import file_stamps
from ramet.srt.model_loader.checksums.entries import compute_checksums
from ramet.srt.utils.net import host_identity
from ramet.srt.weights.memory_messages import MemoryStep
from ramet.srt.weights.update_messages import (
    FilesSource,
    PickledTensors,
    PutTensorsReq,
    SealWeightsReq,
    StageWeightsReq,
    SwitchWeightsReq,
    WeightStep,
    WeightStepOutput,
)
from safetensors.torch import load_file

PROMPTS = rm.random_prompts([9, 17])
NUM_TOKENS = 6


class Updated:
    """A scheduler that is told to change its weights."""

    def __init__(self, folder: Path, **args: Any) -> None:
        self.engine = EngineHarness(folder, **args)
        self.versions = self.engine.runner.versions

    def ask(self, step: WeightStep | MemoryStep) -> WeightStepOutput:
        """The answer, after as many passes as it takes."""
        self.engine.channel.replies.clear()
        self.engine.send(step)
        while not self.engine.channel.replies:
            self.engine.step()
        (reply,) = self.engine.channel.replies
        assert isinstance(reply, WeightStepOutput) and reply.request_id == step.request_id
        return reply

    def stage(self, folder: Path, number: int = 1, **source: Any) -> WeightStepOutput:
        files = source.pop("files", None) or file_stamps(str(folder))
        made = FilesSource(path=str(folder), **{"host_identity": host_identity(), "files": files} | source)
        return self.ask(StageWeightsReq(request_id=f"stage {number}", number=number, source=made))

    def switch(self, number: int = 1, version: str = "new") -> WeightStepOutput:
        return self.ask(SwitchWeightsReq(request_id=f"switch {number}", number=number, version=version))

    def tokens(self) -> list[list[int]]:
        return [result.token_ids for result in self.engine.generate(PROMPTS, max_new_tokens=NUM_TOKENS)]

    def checksums(self) -> tuple[str, ...]:
        """Of what is in the arena, computed now."""
        arena = self.engine.runner.arena
        return compute_checksums(arena.manifest, arena).values

    def put(self, path: Path, number: int = 1, *, is_first: bool = True) -> WeightStepOutput:
        """The tensors of a file into a stage."""
        payload = pickle.dumps(list(load_file(path).items()))
        source = PickledTensors(payloads=[payload], load_format=None, host_identity=host_identity())
        return self.ask(PutTensorsReq(request_id=f"put {path}", number=number, is_first=is_first, source=source))

    def seal(self, number: int = 1) -> WeightStepOutput:
        return self.ask(SealWeightsReq(request_id=f"seal {number}", number=number))
