"""Owns small models on the meta device whose parameters have boxes, and checkpoints for them."""

import json
import os

import torch
from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.weights.manifest import WeightBox, WeightManifest, build_weight_manifest
from safetensors.torch import save_file

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTER, VOCAB, EXPERTS = 32, 4, 2, 8, 48, 100, 4
PADDED_VOCAB = 128


def full(*shape: int) -> tuple[tuple[int, int], ...]:
    return tuple((0, n) for n in shape)


def whole(name: str, *shape: int) -> tuple[WeightBox, ...]:
    return (WeightBox(name, full(*shape), full(*shape)),)


def fused(names_rows: list[tuple[str, int, int]], columns: int) -> tuple[WeightBox, ...]:
    """Row blocks below each other: (checkpoint name, first row, stop row)."""
    boxes, position = [], 0
    for name, start, stop in names_rows:
        rows = stop - start
        boxes.append(WeightBox(name, ((start, stop), (0, columns)), ((position, position + rows), (0, columns))))
        position += rows
    return tuple(boxes)


def checkpoint_tensors(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "layer.q_proj.weight": (HEADS * HEAD_DIM, HIDDEN),
        "layer.k_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
        "layer.v_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
        "layer.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
        "layer.empty": (0, HIDDEN),
        "layer.odd": (7,),
        "layer.scale": (),
    }
    for e in range(EXPERTS):
        shapes[f"layer.experts.{e}.gate_proj.weight"] = (INTER, HIDDEN)
        shapes[f"layer.experts.{e}.up_proj.weight"] = (INTER, HIDDEN)
        shapes[f"layer.experts.{e}.down_proj.weight"] = (HIDDEN, INTER)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def _expert_boxes(tp_size: int, tp_rank: int) -> tuple[tuple[WeightBox, ...], tuple[WeightBox, ...]]:
    part = INTER // tp_size
    start, stop = tp_rank * part, (tp_rank + 1) * part
    up, down = [], []
    for e in range(EXPERTS):
        for i, kind in enumerate(("gate", "up")):
            target = ((e, e + 1), (i * part, (i + 1) * part), (0, HIDDEN))
            up.append(WeightBox(f"layer.experts.{e}.{kind}_proj.weight", ((start, stop), (0, HIDDEN)), target))
        name = f"layer.experts.{e}.down_proj.weight"
        down.append(WeightBox(name, ((0, HIDDEN), (start, stop)), ((e, e + 1), (0, HIDDEN), (0, part))))
    return tuple(up), tuple(down)


def make_model(tp_size: int = 1, tp_rank: int = 0, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """One rank's part: fused qkv, row- and column-sharded matrices, expert stacks, padding rows, a tied head."""
    model = torch.nn.Module()

    def add(name: str, shape: tuple[int, ...], boxes: tuple[WeightBox, ...]) -> None:
        parameter = torch.nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
        parameter.boxes = boxes
        model.register_parameter(name, parameter)

    q, kv, columns = HEADS * HEAD_DIM // tp_size, KV_HEADS * HEAD_DIM // tp_size, HEADS * HEAD_DIM // tp_size
    vocab = PADDED_VOCAB // tp_size
    first, last = tp_rank * vocab, min(VOCAB, (tp_rank + 1) * vocab)
    add(
        "embed",
        (vocab, HIDDEN),
        (WeightBox("model.embed_tokens.weight", ((first, last), (0, HIDDEN)), ((0, last - first), (0, HIDDEN))),),
    )
    add(
        "qkv",
        (q + 2 * kv, HIDDEN),
        fused(
            [
                ("layer.q_proj.weight", tp_rank * q, (tp_rank + 1) * q),
                ("layer.k_proj.weight", tp_rank * kv, (tp_rank + 1) * kv),
                ("layer.v_proj.weight", tp_rank * kv, (tp_rank + 1) * kv),
            ],
            HIDDEN,
        ),
    )
    o_source = ((0, HIDDEN), (tp_rank * columns, (tp_rank + 1) * columns))
    add("o", (HIDDEN, columns), (WeightBox("layer.o_proj.weight", o_source, full(HIDDEN, columns)),))
    up, down = _expert_boxes(tp_size, tp_rank)
    add("w13", (EXPERTS, 2 * INTER // tp_size, HIDDEN), up)
    add("w2", (EXPERTS, HIDDEN, INTER // tp_size), down)
    add("empty", (0, HIDDEN), whole("layer.empty", 0, HIDDEN))
    add("odd", (7,), whole("layer.odd", 7))
    add("scale", (), whole("layer.scale"))
    add("norm", (HIDDEN,), whole("model.norm.weight", HIDDEN))
    model.register_parameter("lm_head", model.embed)
    return model


def make_manifest(model: torch.nn.Module, tp_size: int = 1, tp_rank: int = 0, **changes: str) -> WeightManifest:
    fields = {"model_name": "toy", "revision": "", "dtype": "float32", "quantization": "", "role": "target"}
    return build_weight_manifest(
        model.named_parameters(remove_duplicate=False),
        parallel=ParallelConfig(tp_size=tp_size, tp_rank=tp_rank),
        **(fields | changes),
    )


def expected_tensors(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What each parameter must hold: direct slicing of the checkpoint."""
    result = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        value = torch.zeros(parameter.shape, dtype=parameter.dtype)
        for box in parameter.boxes:
            source = tensors[box.checkpoint_name][tuple(slice(a, b) for a, b in box.source)]
            target = value[tuple(slice(a, b) for a, b in box.target)]
            target.copy_(source.to(value.dtype).reshape(target.shape))
        result[name] = value
    return result


def assert_loaded(model: torch.nn.Module, expected: dict[str, torch.Tensor]) -> None:
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert torch.equal(parameter, expected[name]), name


def save_checkpoint(folder: str | os.PathLike, tensors: dict[str, torch.Tensor], num_files: int = 1) -> None:
    """Write safetensors files, with an index when there are several."""
    if num_files == 1:
        save_file(tensors, os.path.join(folder, "model.safetensors"))
        return
    weight_map = {}
    for i in range(num_files):
        name = f"model-{i + 1:05}-of-{num_files:05}.safetensors"
        part = dict(list(tensors.items())[i::num_files])
        save_file(part, os.path.join(folder, name))
        weight_map |= dict.fromkeys(part, name)
    with open(os.path.join(folder, "model.safetensors.index.json"), "w", encoding="utf-8") as file:
        json.dump({"metadata": {}, "weight_map": weight_map}, file)
