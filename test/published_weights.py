"""What ranks of a trainer publish, in layouts that trainers have, and what ranks of instances have taken of it."""

import contextlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import fp8_models
import msgspec
import random_models as rm
import sharded_models as sm
import torch
from ramet.srt.configs.load_config import LoadConfig
from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.model_loader.arena.base import WeightArena
from ramet.srt.model_loader.checkpoint.describe_model import describe_whole_model
from ramet.srt.model_loader.checksums.entries import compute_checksums
from ramet.srt.model_loader.client.published import take_published
from ramet.srt.utils.net import SeedAddress, split_address
from ramet.srt.weights.manifest import WeightBox, build_weight_manifest
from ramet.srt.weights.registration import PublishedModel, SeedAnswer
from ramet.srt.weights.report import LoadReport
from ramet.trainer import Slice, Sliced, WeightPublisher
from ramet.trainer.tensors import Held, Weights
from safetensors.torch import load_file, save_file
from seed_server import write_random_model

MODEL = "policy"
COLUMNS = ("o_proj.weight", "down_proj.weight")  # that tensor parallelism cuts along columns; other matrices along rows


def make_models(folder: Path, **overrides: Any) -> dict[str, Path]:
    """Two checkpoints of one model."""
    old = write_random_model(folder / "old", "llama2", dtype="bfloat16", **overrides)
    rm.write_tokenizer(old)
    new = Path(shutil.copytree(old, folder / "new"))
    tensors = load_file(old / "model.safetensors")
    save_file({name: tensor.flip(0).contiguous() for name, tensor in tensors.items()}, new / "model.safetensors")
    return {"old": old, "new": new}


def halves(weights: Mapping[str, torch.Tensor], rank: int, size: int = 2) -> dict[str, Sliced]:
    """What a tensor-parallel rank of a trainer has: a part of each matrix, and all of each vector."""
    found = {}
    for name, tensor in weights.items():
        source = [(0, extent) for extent in tensor.shape]
        if tensor.dim() == 2:
            dim = int(name.endswith(COLUMNS))
            bounds = [tensor.shape[dim] * part // size for part in (rank, rank + 1)]
            source[dim] = (bounds[0], bounds[1])
        local = tensor[tuple(slice(*bounds) for bounds in source)].contiguous()
        found[name] = Sliced(local, Slice(name, tuple(tensor.shape), tuple(source)))
    return found


def quarters(weights: Mapping[str, torch.Tensor], rank: int) -> dict[str, Sliced]:
    """What a rank of a trainer of two pipeline stages has, of two tensor-parallel ranks each."""
    stage, part = divmod(rank, 2)
    layers = sorted({int(name.split(".")[2]) for name in weights if name.startswith("model.layers.")})
    first = layers[: len(layers) // 2]

    def stage_of(name: str) -> int:
        if name.startswith("model.layers."):
            return int(int(name.split(".")[2]) not in first)
        return int(not name.startswith("model.embed"))

    return halves({name: one for name, one in weights.items() if stage_of(name) == stage}, part)


def fused(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor | Sliced]:
    """All of it, q, k and v of each layer in one tensor, as trainers fuse them."""
    found: dict[str, torch.Tensor | Sliced] = dict(weights)
    for name in [name for name in weights if name.endswith("self_attn.q_proj.weight")]:
        parts = [name.replace("q_proj", f"{one}_proj") for one in "qkv"]
        tensors = [weights[part] for part in parts]
        slices, start = [], 0
        for part, tensor in zip(parts, tensors, strict=True):
            rows, columns = tensor.shape
            target = ((start, start + rows), (0, columns))
            slices.append(Slice(part, (rows, columns), ((0, rows), (0, columns)), target))
            start += rows
            del found[part]
        found[name.replace("q_proj", "qkv_proj")] = Sliced(torch.cat(tensors), *slices)
    return found


@contextlib.contextmanager
def published(*ranks: Weights, version: str = "step-1", **options) -> Iterator[list[WeightPublisher]]:
    """A publisher for each rank of a trainer, in this process."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(WeightPublisher(weights, version, **options)) for weights in ranks]


def answer_of(shapes: Mapping[str, tuple[int, ...]], rank: int) -> bytes:
    """What a tensor-parallel rank of a trainer of two answers, without having the tensors."""
    with torch.device("meta"):
        parts = halves({name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}, rank)
    named = []
    for name, part in parts.items():
        (one,) = part.slices
        whole = tuple((0, extent) for extent in part.tensor.shape)
        named.append((name, Held(name, part.tensor, torch.bfloat16, (WeightBox(name, one.source, whole),), {})))
    manifest = build_weight_manifest(named, model_name="", revision="", dtype="bfloat16", quantization="",
                                     role="target", parallel=ParallelConfig())  # fmt: skip
    answer = SeedAnswer(
        rank=0,
        remote_instance_transfer_engine_info=("127.0.0.1:1", {}),
        manifest=manifest,
        arena_address=4096,
        published=PublishedModel(run="", shapes=dict(shapes)),
    )
    return msgspec.json.encode(answer)


def take(
    folder: Path,
    publishers: list[WeightPublisher],
    parallel: ParallelConfig,
    quantization: str | None = None,
    version: str = "step-1",
    config: LoadConfig | None = None,
) -> tuple[WeightArena, LoadReport]:
    """What one rank of an instance has taken, and how."""
    addresses = [one.address for one in publishers]
    return take_from(folder, addresses, parallel, quantization, version, config)


def take_from(
    folder: Path,
    addresses: Sequence[str],
    parallel: ParallelConfig,
    quantization: str | None = None,
    version: str = "step-1",
    config: LoadConfig | None = None,
    device: str = "cpu",
) -> tuple[WeightArena, LoadReport]:
    """The same from the addresses of all ranks of a trainer."""
    model = sm.build_model(folder, parallel, quantization)
    manifest = sm.make_manifest(model)
    stage = sm.allocate_arena(manifest, device)
    ranks = [SeedAddress(*split_address(one, "")) for one in addresses]
    whole = describe_whole_model(model.config, manifest)
    report = take_published(stage, ranks, version, config or LoadConfig(timeout_s=10.0), whole)
    return stage, report


def assert_as_from_files(folder: Path, stage: WeightArena, quantization: str | None = None) -> None:
    """Every byte is that of a load from the files in a folder."""
    model = sm.build_model(folder, stage.manifest.parallel, quantization)
    loaded = fp8_models.load_arena(folder, model, stage.device)
    assert stage.manifest.entries == loaded.manifest.entries
    got, wanted = compute_checksums(stage.manifest, stage), compute_checksums(loaded.manifest, loaded)
    names = [entry.name for entry in stage.manifest.entries]
    assert [n for n, a, b in zip(names, got.values, wanted.values, strict=True) if a != b] == []
