"""Owns a rank's part of an adapter as weights: which tensors it has, and which boxes of the adapter's fill them.

It is a manifest like a model's, so it comes from files and from other instances, of whatever topology, in the same
ways, and is verified in the same ways. It has the adapter's own type, so that its bytes are those of the file.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.layers.lora import LoraPart
from ramet.srt.lora.adapter import LoraAdapter, LoraModule, lora_role
from ramet.srt.model_loader.checkpoint.whole_model import WholeModel
from ramet.srt.weights.errors import name_some
from ramet.srt.weights.manifest import WeightBox, WeightManifest, build_weight_manifest

Shape = tuple[int, int]
DECODER_PREFIX = "model."  # of names in a model with an output head


@dataclass(frozen=True)
class _Tensor:
    """What a manifest wants to know of a parameter."""

    shape: Shape
    dtype: str
    boxes: Sequence[WeightBox]


def check_adapter(adapter: LoraAdapter, shapes: Mapping[str, Shape], max_rank: int) -> None:
    """Find out whether an adapter is one of a model.

    Args:
        shapes: of the matrices that adapters may add to, in the whole model: [output_size, input_size].
        max_rank: that the slots have room for.

    Raises:
        ValueError: the message says what does not fit.
    """
    names = {module.name for module in adapter.modules}
    if unknown := sorted(names - shapes.keys()):
        raise ValueError(
            f"the adapter adds to {name_some(unknown)}, which the model does not have, or not as a linear layer that "
            "adapters can add to: experts, routers, the embedding and the output head are not supported"
        )
    prefix = "" if any(module.name == module.file_name for module in adapter.modules) else DECODER_PREFIX
    if lost := [name for name in shapes if name not in names and adapter.targets.has(name.removeprefix(prefix))]:
        raise ValueError(f"the adapter's config names {name_some(lost)} as targets, of which its file has nothing")
    if adapter.max_rank > max_rank:
        raise ValueError(f"the adapter has the rank {adapter.max_rank}; --max-lora-rank is {max_rank}")


def describe_adapter(adapter: LoraAdapter, shapes: Mapping[str, Shape]) -> WholeModel:
    """What an adapter's file must hold: with these shapes, and nothing else."""
    tensors: dict[str, tuple[int, ...]] = {}
    for module in adapter.modules:
        output_size, input_size = shapes[module.name]
        tensors[module.a_name] = (module.rank, input_size)
        tensors[module.b_name] = (output_size, module.rank)
    return WholeModel(tensors, frozenset(), is_tied=False, has_head=False)


def adapter_manifest(
    adapter: LoraAdapter,
    name: str,
    parts: Mapping[str, LoraPart],
    parallel: ParallelConfig,
    dimensions: dict[str, int],
) -> WeightManifest:
    """A rank's part of an adapter.

    Args:
        name: of the adapter among those that give it, or get it.
        parts: of the rank's layers, by the names of their matrices; those of other pipeline stages are not there.
        dimensions: of the model.
    """
    tensors = {}
    for module in adapter.modules:
        if module.name in parts:
            tensors[module.a_name] = _tensor_a(module, parts[module.name], adapter.dtype)
            tensors[module.b_name] = _tensor_b(module, parts[module.name], adapter.dtype)
    return build_weight_manifest(
        tensors.items(),
        model_name=name,
        revision="",
        dtype=adapter.dtype,
        quantization="",
        role=lora_role(name),
        parallel=parallel,
        dimensions=dimensions,
    )


def _tensor_a(module: LoraModule, part: LoraPart, dtype: str) -> _Tensor:
    first, last = part.columns
    shape = (module.rank, last - first)
    box = WeightBox(module.a_name, ((0, module.rank), part.columns), ((0, module.rank), (0, last - first)))
    return _Tensor(shape, dtype, [box])


def _tensor_b(module: LoraModule, part: LoraPart, dtype: str) -> _Tensor:
    boxes = []
    start = 0
    for first, last in part.rows:
        target = (start, start + last - first)
        boxes.append(WeightBox(module.b_name, ((first, last), (0, module.rank)), (target, (0, module.rank))))
        start = target[1]
    return _Tensor((part.num_rows, module.rank), dtype, boxes)
