"""Owns the tests of a model's tensors that an arena takes the place of, and of host memory that goes back with them."""

import gc

import pytest
import torch
from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.model_loader.arena.host import HostWeightArena
from ramet.srt.utils.host_memory import resident_file_nbytes
from ramet.srt.weights.manifest import WeightBox, build_weight_manifest
from ramet_vllm.model_layout import ModelTensor
from ramet_vllm.model_memory import ModelMemory
from torch import nn

ROWS = 1 << 16  # of 64 bytes: many pages


class Model(nn.Module):
    """Two matrices, one of them under two names, and two buffers."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(32, ROWS, bias=False, dtype=torch.bfloat16)
        self.second = nn.Linear(32, ROWS, bias=False, dtype=torch.bfloat16)
        self.tied = self.second
        self.empty = nn.Parameter(torch.empty(0))
        self.register_buffer("scale", torch.ones(3))
        self.register_buffer("table", torch.ones(4))


def filled_arena(memory: ModelMemory) -> HostWeightArena:
    tensors = memory.describe({"scale": []})
    whole = [tuple((0, extent) for extent in one.shape) for one in tensors]
    boxed = [ModelTensor(one.name, one.dtype, one.shape, (WeightBox(one.name, box, box),))
             for one, box in zip(tensors, whole, strict=True)]  # fmt: skip
    manifest = build_weight_manifest(
        ((one.name, one) for one in boxed), model_name="m", revision="", dtype="bfloat16", quantization="",
        role="target", parallel=ParallelConfig(),
    )  # fmt: skip
    arena = HostWeightArena(manifest)
    for number, entry in enumerate(manifest.entries):
        arena.tensor(entry).fill_(number + 2)
    return arena


def test_the_arena_takes_the_place_of_the_parameters():
    model = Model()
    memory = ModelMemory(model)
    model.first.weight.mark = "vLLM's"  # parameters keep what layers have put on them
    assert set(memory.tensors) == {"first.weight", "second.weight", "scale", "table"}
    arena = filled_arena(memory)
    memory.give_back()
    assert model.first.weight.numel() == 0
    memory.show(arena)
    del memory, arena
    gc.collect()
    assert model.first.weight.shape == (ROWS, 32) and torch.all(model.first.weight == 2)
    assert model.first.weight.mark == "vLLM's"
    assert torch.all(model.tied.weight == 3) and model.tied.weight is model.second.weight
    assert model.scale.tolist() == [4, 4, 4] and model.table.tolist() == [1, 1, 1, 1]


def test_after_a_failure_the_parameters_have_memory_of_their_own_again():
    model = Model()
    memory = ModelMemory(model)
    memory.give_back()
    memory.take_again()
    assert {name: one.shape for name, one in model.named_parameters()} == {
        "first.weight": (ROWS, 32), "second.weight": (ROWS, 32), "empty": (0,)
    }  # fmt: skip
    model.first.weight.data.fill_(1)


def test_memory_goes_back_with_the_last_who_has_a_parameter():
    """So that weights which vLLM packs anew, one after the other, are never all there twice."""
    model = Model()
    memory = ModelMemory(model)
    arena = filled_arena(memory)
    memory.show(arena)
    before = resident_file_nbytes(arena.own_fd)
    kept = model.first.weight.data[5:7]
    model.first.weight = nn.Parameter(torch.empty(0), requires_grad=False)
    memory.parameters.clear()
    gc.collect()
    assert resident_file_nbytes(arena.own_fd) == before and kept.tolist() == [[2] * 32] * 2
    del kept
    gc.collect()
    assert before - resident_file_nbytes(arena.own_fd) >= ROWS * 64 - 8192
    assert torch.all(model.second.weight == 3)


def test_a_parameter_that_does_not_lie_row_by_row_is_refused():
    model = Model()
    model.first.weight.data = model.first.weight.data.t()
    with pytest.raises(ValueError, match="lays first.weight out in another order"):
        ModelMemory(model).describe({})
