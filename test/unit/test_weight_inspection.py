"""What is told of a rank's weights: the numbers of a tensor, and checksums; and how several ranks' parts become one."""

from pathlib import Path

import pytest
import random_models as rm
import torch
from engine_harness import EngineHarness
from ramet.srt.model_executor.weight_inspection import MAX_NUMBERS, find_boxes, put_together
from ramet.srt.weights.inspection_messages import (
    CheckWeightsOutput,
    CheckWeightsReq,
    RankReading,
    ReadWeightOutput,
    ReadWeightReq,
    WeightPart,
)
from safetensors.torch import load_file


class Looked:
    def __init__(self, folder: Path) -> None:
        self.engine = EngineHarness(folder)
        self.weights = load_file(folder / "model.safetensors")

    def ask(self, question: ReadWeightReq | CheckWeightsReq) -> ReadWeightOutput | CheckWeightsOutput:
        self.engine.channel.replies.clear()
        self.engine.send(question)
        self.engine.step()
        (reply,) = self.engine.channel.replies
        assert isinstance(reply, ReadWeightOutput | CheckWeightsOutput) and reply.request_id == question.request_id
        return reply

    def read(self, name: str, num_rows: int = 100) -> ReadWeightOutput:
        reply = self.ask(ReadWeightReq(request_id="1", name=name, num_rows=num_rows))
        assert isinstance(reply, ReadWeightOutput)
        return reply


def numbers(reply: ReadWeightOutput) -> torch.Tensor:
    assert not reply.failure
    return torch.frombuffer(bytearray(reply.values), dtype=torch.float32).reshape(reply.shape)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Looked]:
    folder = tmp_path_factory.mktemp("models")
    return {family: Looked(rm.make_model(folder / family, family)) for family in ("llama3", "qwen3_moe")}


@pytest.mark.parametrize("family", ["llama3", "qwen3_moe"])
def test_every_tensor_of_a_checkpoint_is_told(models: dict[str, Looked], family: str) -> None:
    one = models[family]
    for name, tensor in one.weights.items():
        assert torch.equal(numbers(one.read(name, 50)), tensor[:50].float()), name


def test_a_fused_tensor_is_told_and_a_stack_of_experts_is_refused(models: dict[str, Looked]) -> None:
    one = models["qwen3_moe"]
    parts = [one.weights[f"model.layers.0.self_attn.{part}_proj.weight"] for part in "qkv"]
    told = numbers(one.read("model.layers.0.self_attn.qkv_proj.weight", 1000))
    assert torch.equal(told, torch.cat(parts).float())
    stacked = [entry.name for entry in one.engine.runner.manifest.entries if len(entry.shape) == 3]
    failure = one.read(stacked[0]).failure
    assert failure.startswith(f"{stacked[0]} is a stack of tensors") and ".experts.0." in failure
    assert "there is no tensor 'other'" in one.read("other").failure


def test_what_is_too_much_is_refused_before_it_is_read() -> None:
    question = ReadWeightReq(request_id="1", name="a", num_rows=100)
    width = MAX_NUMBERS // 100 + 1
    part = WeightPart(0, ((0, 100), (0, width)), b"")
    assert "choose a smaller truncate_size" in put_together(question, [RankReading(parts=[part])]).failure


def test_parts_of_ranks_become_one_and_what_nobody_has_is_said() -> None:
    question = ReadWeightReq(request_id="1", name="a", num_rows=3)
    whole = torch.arange(12.0).reshape(3, 4)

    def part(rows: tuple[int, int], columns: tuple[int, int]) -> WeightPart:
        return WeightPart(0, (rows, columns), whole[slice(*rows), slice(*columns)].contiguous().numpy().tobytes())

    left, right = part((0, 3), (0, 2)), part((0, 3), (2, 4))
    assert torch.equal(numbers(put_together(question, [RankReading(parts=[one]) for one in (left, right)])), whole)
    twice = [RankReading(parts=[left, right]), RankReading(parts=[right])]
    assert torch.equal(numbers(put_together(question, twice)), whole)
    holed = [RankReading(parts=[part((0, 3), (0, 1)), right]), RankReading()]
    assert "don't have all of it" in put_together(question, holed).failure
    failed = [RankReading(parts=[left]), RankReading(failure="broken")]
    assert put_together(question, failed).failure == "broken"


def test_checksums_are_those_of_the_memory(models: dict[str, Looked]) -> None:
    one = models["llama3"]

    def check(action: str) -> CheckWeightsOutput:
        reply = one.ask(CheckWeightsReq(request_id="2", action=action))  # type: ignore[arg-type]
        assert isinstance(reply, CheckWeightsOutput)
        return reply

    assert check("compare").ranks[0].failure == "there is no snapshot to compare with"
    (before,) = check("snapshot").ranks
    arena = one.engine.runner.arena
    assert tuple(before.checksums.values()) == arena.hash_entries(arena.manifest.entries)
    assert {len(value) for value in before.checksums.values()} == {16}
    assert not check("compare").ranks[0].different
    entry = find_boxes(arena.manifest, "model.norm.weight")[0][1]
    kept = arena.tensor(entry)[3].clone()
    arena.tensor(entry)[3] += 1
    (after,) = check("compare").ranks
    assert after.different == ["model.norm.weight"]
    arena.tensor(entry)[3] = kept
    assert not check("compare").ranks[0].different
