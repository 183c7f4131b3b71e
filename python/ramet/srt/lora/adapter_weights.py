"""Owns a rank's part of an adapter as weights: which tensors it has, and which boxes of the adapter's fill them.

It is a manifest like a model's, so it comes from files and from other instances, of whatever topology, in the same
ways, and is verified in the same ways. It has the adapter's own type, so that its bytes are those of the file.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import msgspec

from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.layers.lora import LoraPart
from ramet.srt.lora.adapter import PEFT_PREFIX, LoraAdapter, LoraModule, lora_role
from ramet.srt.model_loader.checkpoint.whole_model import WholeModel, boxes_of, collect_boxes
from ramet.srt.weights.errors import name_some
from ramet.srt.weights.manifest import WeightBox, WeightManifest, build_weight_manifest

Shape = tuple[int, int]
DECODER_PREFIX = "model."  # of the names of matrices here
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}  # as Phi has them


@dataclass(frozen=True)
class LoraProduct:
    """What an adapter adds to one matrix, and where its file has that: of a fused matrix' B each part has some rows."""

    name: str  # of the matrix
    module: LoraModule
    first_row: int = 0  # of the module's B

    @property
    def a_entry(self) -> str:
        """What manifests call A."""
        return f"{self.name}.lora_A"

    @property
    def b_entry(self) -> str:
        """What manifests call B."""
        return f"{self.name}.lora_B"


@dataclass(frozen=True)
class _Tensor:
    """What a manifest wants to know of a parameter."""

    shape: Shape
    dtype: str
    boxes: Sequence[WeightBox]


def without_surplus(adapter: LoraAdapter, surplus: str) -> LoraAdapter:
    """The adapter without what it adds to parts of the checkpoint that the model is built without: those for pictures.

    Args:
        surplus: a regular expression of the names of their tensors; empty if there are none.

    Raises:
        ValueError: if nothing is left.
    """
    if not surplus:
        return adapter
    modules = tuple(module for module in adapter.modules if not re.match(surplus, module.file_name))
    if not modules:
        names = name_some([module.file_name for module in adapter.modules])
        raise ValueError(f"the adapter adds to {names} alone, which are no part of the model for text")
    return msgspec.structs.replace(adapter, modules=modules)


def products_of(adapter: LoraAdapter, shapes: Mapping[str, Shape]) -> list[LoraProduct]:
    """What an adapter adds to the matrices of a model; of those that the model does not have, too.

    Args:
        shapes: of the matrices that adapters may add to, in the whole model: [output_size, input_size].
    """
    return [product for module in adapter.modules for product in _products(module, shapes)]


def _products(module: LoraModule, shapes: Mapping[str, Shape]) -> list[LoraProduct]:
    prefix, _, last = module.name.rpartition(".")
    names = [f"{prefix}.{part}" for part in FUSED.get(last, ())]
    if module.name in shapes or not names or any(name not in shapes for name in names):
        return [LoraProduct(module.name, module)]
    ends = accumulate(shapes[name][0] for name in names)
    return [LoraProduct(name, module, end - shapes[name][0]) for name, end in zip(names, ends, strict=True)]


def check_adapter(adapter: LoraAdapter, shapes: Mapping[str, Shape], max_rank: int) -> None:
    """Find out whether an adapter is one of a model.

    Args:
        shapes: see products_of.
        max_rank: that the slots have room for.

    Raises:
        ValueError: the message says what does not fit.
    """
    names = {product.name for product in products_of(adapter, shapes)}
    if unknown := sorted(names - shapes.keys()):
        raise ValueError(
            f"the adapter adds to {name_some(unknown)}, which the model does not have, or not as a linear layer that "
            "adapters can add to: experts, routers, the kv_b_proj of latent attention, the embedding and the output "
            "head are not supported"
        )
    if lost := [name for name in shapes if name not in names and adapter.targets.has(_file_name(adapter, name))]:
        raise ValueError(f"the adapter's config names {name_some(lost)} as targets, of which its file has nothing")
    if adapter.max_rank > max_rank:
        raise ValueError(f"the adapter has the rank {adapter.max_rank}; --max-lora-rank is {max_rank}")


def _file_name(adapter: LoraAdapter, name: str) -> str:
    """What the adapter's file would call a matrix: by the prefix that it has in place of the model's."""
    known = adapter.modules[0]
    prefix = known.file_name.removesuffix(known.name.removeprefix(DECODER_PREFIX))
    return prefix + name.removeprefix(DECODER_PREFIX)


def describe_adapter(
    adapter: LoraAdapter, products: Sequence[LoraProduct], whole_parts: Mapping[str, LoraPart], surplus: str
) -> WholeModel:
    """What an adapter's file must hold: with the shapes that follow, and nothing else but the surplus.

    Args:
        whole_parts: of the whole model, as one rank would hold it.
        surplus: see without_surplus.
    """
    manifest = adapter_manifest(adapter, products, adapter.name, whole_parts, ParallelConfig(), {})
    idle = rf"{re.escape(PEFT_PREFIX)}({surplus})" if surplus else ""
    return replace(collect_boxes(boxes_of(manifest.entries)), is_tied=False, has_head=False, surplus=idle)


def adapter_manifest(
    adapter: LoraAdapter,
    products: Iterable[LoraProduct],
    name: str,
    parts: Mapping[str, LoraPart],
    parallel: ParallelConfig,
    dimensions: dict[str, int],
) -> WeightManifest:
    """A rank's part of an adapter.

    Args:
        products: see products_of.
        name: of the adapter among those that give it, or get it.
        parts: of the rank's layers, by the names of their matrices; those of other pipeline stages are not there.
        dimensions: of the model.
    """
    tensors = {}
    for product in products:
        if product.name in parts:
            tensors[product.a_entry] = _tensor_a(product, parts[product.name], adapter.dtype)
            tensors[product.b_entry] = _tensor_b(product, parts[product.name], adapter.dtype)
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


def _tensor_a(product: LoraProduct, part: LoraPart, dtype: str) -> _Tensor:
    module, (first, last) = product.module, part.columns
    box = WeightBox(module.a_name, ((0, module.rank), part.columns), ((0, module.rank), (0, last - first)))
    return _Tensor((module.rank, last - first), dtype, [box])


def _tensor_b(product: LoraProduct, part: LoraPart, dtype: str) -> _Tensor:
    module, first_row = product.module, product.first_row
    boxes = []
    start = 0
    for first, last in part.rows:
        source, target = (first_row + first, first_row + last), (start, start + last - first)
        boxes.append(WeightBox(module.b_name, (source, (0, module.rank)), (target, (0, module.rank))))
        start = target[1]
    return _Tensor((part.num_rows, module.rank), dtype, boxes)
