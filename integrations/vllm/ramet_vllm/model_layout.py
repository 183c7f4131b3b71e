"""Owns a vLLM rank's manifest: its tensors as entries, and what its own loading puts into them as boxes. Pure data."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.weights.boxes import Region, intersect, region_volume, share_out
from ramet.srt.weights.errors import name_some
from ramet.srt.weights.manifest import WeightBox, WeightManifest, build_weight_manifest

from ramet_vllm.watched_load import CannotMap, CheckpointTensor, Placed

EXPERTS = ".experts."


@dataclass(frozen=True)
class ModelTensor:
    """One of the model's tensors, as build_weight_manifest takes it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    boxes: tuple[WeightBox, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What is said of the whole model, which must agree with what the seed says."""

    model_name: str
    revision: str
    dtype: str
    weight_version: str
    dimensions: Mapping[str, int]
    is_tied: bool
    has_all_experts: bool  # False: others of the instance hold some


def lay_out(
    tensors: Sequence[ModelTensor],
    placed: Placed,
    checkpoint: Mapping[str, CheckpointTensor],
    facts: ModelFacts,
    parallel: ParallelConfig,
) -> WeightManifest:
    """The manifest of a rank, laid out in the order of the checkpoint's tensors, as the seed's is.

    Args:
        tensors: the rank's parameters, and those of its buffers that its loading writes to.
        checkpoint: what was offered, in order.

    Raises:
        CannotMap: if a part of a tensor is filled by nothing or twice, or an offered tensor is left over.
    """
    _check_left_over(placed, checkpoint, facts, parallel)
    places = {name: place for place, name in enumerate(checkpoint)}
    filled = []
    empty, partly = [], []
    for tensor in tensors:
        boxes, zeros = placed.boxes.get(tensor.name, []), placed.zeros.get(tensor.name, [])
        if not boxes:
            empty.append(tensor.name)
            continue
        _check_disjoint(tensor.name, boxes)
        if not _is_covered(tensor.shape, [*(box.target for box in boxes), *zeros]):
            partly.append(tensor.name)
        filled.append(ModelTensor(tensor.name, tensor.dtype, tensor.shape, tuple(boxes)))
    if empty or partly:
        what = f"no tensor of the seed fills {name_some(empty)}" if empty else ""
        what += ("; " if empty and partly else "") + (f"only a part is filled of {name_some(partly)}" if partly else "")
        raise CannotMap(what)
    filled.sort(key=lambda tensor: min(places[box.checkpoint_name] for box in tensor.boxes))
    return build_weight_manifest(
        ((tensor.name, tensor) for tensor in filled),
        model_name=facts.model_name,
        revision=facts.revision,
        dtype=facts.dtype,
        quantization="",
        role="target",
        parallel=parallel,
        dimensions=dict(facts.dimensions),
        is_tied=facts.is_tied,
        weight_version=facts.weight_version,
    )


def shared_dimensions(seed: Mapping[str, int], config: object) -> dict[str, int]:
    """The sizes of the seed's model that a Hugging Face config has by the same name, as that config has them."""
    return {name: value for name in seed if isinstance(value := getattr(config, name, None), int)}


def _check_left_over(placed: Placed, checkpoint: Iterable[str], facts: ModelFacts, parallel: ParallelConfig) -> None:
    """Raises CannotMap if something was offered that nobody took, and that no other rank can have taken either."""
    if parallel.pp_size > 1:
        return
    used = {box.checkpoint_name for boxes in placed.boxes.values() for box in boxes}
    rest = [name for name in checkpoint if name not in used and (facts.has_all_experts or EXPERTS not in name)]
    if rest:
        raise CannotMap(f"the model leaves out tensors that the seed has: {name_some(rest)}")


def _check_disjoint(name: str, boxes: Sequence[WeightBox]) -> None:
    """Raises CannotMap if two checkpoint tensors fill the same part: which of them counts, bytes don't tell."""
    active: list[WeightBox] = []
    for box in sorted(boxes, key=lambda box: box.target):
        start = box.target[0][0] if box.target else 0
        active = [other for other in active if not other.target or other.target[0][1] > start]
        for other in active:
            if intersect(box.target, other.target) is not None:
                raise CannotMap(f"both {other.checkpoint_name} and {box.checkpoint_name} fill the same part of {name}")
        active.append(box)


def _is_covered(shape: Sequence[int], regions: Sequence[Region]) -> bool:
    whole = tuple((0, extent) for extent in shape)
    if sum(map(region_volume, regions)) < region_volume(whole):
        return False
    missing = share_out(whole, (("", region) for region in regions))[1]
    return not missing
