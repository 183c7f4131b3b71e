"""Owns the tests of a model's parameters in a GPU's arena as vLLM's plugin puts them there, without vLLM."""

import torch
from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.model_loader.arena.allocate import allocate_arena
from ramet.srt.weights.manifest import build_weight_manifest
from ramet_vllm.model_layout import ModelTensor
from ramet_vllm.model_memory import ModelMemory
from ramet_vllm.watched_load import CheckpointTensor, watch_load
from torch import nn

ROWS, COLUMNS = 1 << 20, 64  # 128 MB in bfloat16


class Model(nn.Module):
    """A matrix of two fused ones, and a buffer."""

    def __init__(self):
        super().__init__()
        self.fused = nn.Linear(COLUMNS, ROWS, bias=False, dtype=torch.bfloat16, device="cuda")
        self.register_buffer("scale", torch.ones(4, device="cuda"))

    def load_weights(self, weights):
        for name, tensor in weights:
            if name == "scale":
                self.scale.copy_(tensor)
            else:
                half = 0 if name == "first" else ROWS // 2
                self.fused.weight.data[half : half + ROWS // 2].copy_(tensor.to("cuda"))


def test_an_arena_on_the_gpu_takes_the_place_of_the_parameters():
    """With never more than one copy of them, and nothing copied while the loading is watched."""
    model = Model()
    memory = ModelMemory(model)
    halves = [CheckpointTensor(name, "bfloat16", (ROWS // 2, COLUMNS)) for name in ("first", "second")]
    offered = [*halves, CheckpointTensor("scale", "float32", (4,))]
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    placed = watch_load(model.load_weights, memory.tensors, offered, readable=memory.buffers)
    assert [box.target[0] for box in placed.boxes["fused.weight"]] == [(0, ROWS // 2), (ROWS // 2, ROWS)]
    assert torch.cuda.max_memory_allocated() == before and model.scale.tolist() == [1] * 4
    tensors = [ModelTensor(one.name, one.dtype, one.shape, tuple(placed.boxes[one.name]))
               for one in memory.describe(placed.boxes)]  # fmt: skip
    manifest = build_weight_manifest(
        ((one.name, one) for one in tensors), model_name="m", revision="", dtype="bfloat16", quantization="",
        role="target", parallel=ParallelConfig(),
    )  # fmt: skip
    memory.give_back()
    assert torch.cuda.memory_allocated() < before - ROWS * COLUMNS * 2 + (1 << 20)
    arena = allocate_arena(manifest, memory.device)
    for number, entry in enumerate(manifest.entries):
        arena.tensor(entry).fill_(number + 2)
    memory.show(arena)
    del arena
    torch.cuda.synchronize()
    values = {entry.name: number + 2 for number, entry in enumerate(manifest.entries)}
    assert torch.all(model.fused.weight == values["fused.weight"])
    assert model.scale.tolist() == [values["scale"]] * 4
    assert torch.cuda.max_memory_allocated() < before + (8 << 20)
