"""Owns which checkpoint tensors a whole model is made of, over all its stages and ranks, as plain data."""

import dataclasses
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from ramet.srt.configs.quantization_config import QuantizationConfig
from ramet.srt.weights.manifest import WeightBox, WeightEntry, WeightManifest, says_tied

FP8 = "float8_e4m3fn"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
ROUTER = ".gate.weight"
SCALE_SUFFIXES = ("_scale", "_scale_inv")
GRID_ATTRIBUTES = (*SCALE_SUFFIXES, "_scale_2", "_zeros", "_column_groups")  # ends of entries beside a quantised one


@dataclass(frozen=True)
class WholeModel:
    """What a checkpoint must hold, and what the model's config says of its types."""

    shapes: dict[str, tuple[int, ...]]  # of all checkpoint tensors, those of all grids too
    dtypes: dict[str, str]  # as ranks hold them
    quantised: frozenset[str]  # the values of quantised matrices among them
    grids: frozenset[str]  # their scales, zeros and so on
    is_tied: bool  # whether the output head is the embedding's table
    quantization: QuantizationConfig | None = None
    is_complete: bool = True  # False: only what one of several ranks needs is known
    knows_config: bool = True  # False: there is nothing but a manifest to go by
    surplus: str = ""  # a regular expression of names that the files may hold beside, if it isn't empty
    has_fp8_cache: bool = False  # whether its KV cache is
    has_head: bool = True  # False: an output head that the files may hold is of no use

    @property
    def hidden_size(self) -> int | None:
        """Columns of a router, of a model that has one."""
        return next((shape[1] for name, shape in self.shapes.items() if name.endswith(ROUTER)), None)


def describe_rank(manifest: WeightManifest) -> WholeModel:
    """What is known of a whole model by the manifest of one rank."""
    is_complete = is_whole(manifest)
    found = collect_boxes(boxes_of(manifest.entries))
    is_tied = says_tied(manifest)
    if is_tied is None:
        is_tied = is_complete and HEAD not in found.shapes
    return dataclasses.replace(found, is_tied=is_tied, is_complete=is_complete, knows_config=False)


def is_whole(manifest: WeightManifest) -> bool:
    """Whether one rank holds all of its model."""
    parallel = manifest.parallel
    return parallel.tp_size == parallel.pp_size == parallel.ep_size == 1


def boxes_of(entries: Iterable[WeightEntry]) -> list[tuple[str, str, WeightBox]]:
    """All boxes, each with the name and the dtype of its entry."""
    return [(entry.name, entry.dtype, box) for entry in entries for box in entry.boxes]


def grids_of(names: Collection[str]) -> dict[str, list[str]]:
    """The quantised ones among entries of these names, each with the entries of its scales, zeros and so on."""
    known = set(names)
    grids = {name: [name + end for end in GRID_ATTRIBUTES if name + end in known] for name in names}
    return {name: found for name, found in grids.items() if any(grid.endswith(SCALE_SUFFIXES) for grid in found)}


def collect_boxes(
    boxes: Sequence[tuple[str, str, WeightBox]], quantization: QuantizationConfig | None = None
) -> WholeModel:
    """The model that boxes, each with its entry's name and dtype, take everything of."""
    found = grids_of({entry for entry, _, _ in boxes})
    beside = {grid for grids in found.values() for grid in grids}
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes, quantised, grids = {}, set(), set()
    for entry, dtype, box in boxes:
        name, reach = box.checkpoint_name, tuple(stop for _, stop in box.source)
        known = shapes.get(name)
        shapes[name] = reach if known is None else tuple(map(max, reach, known))
        dtypes[name] = dtype
        if entry in found:
            quantised.add(name)
        elif entry in beside:
            grids.add(name)
    return WholeModel(shapes, dtypes, frozenset(quantised), frozenset(grids), HEAD not in shapes, quantization)
