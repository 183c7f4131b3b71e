"""Owns which checkpoint tensors a whole model is made of, over all its stages and ranks, as plain data."""

import dataclasses
import functools
from collections.abc import Iterable
from dataclasses import dataclass

from ramet.srt.configs.quantization_config import QuantizationConfig
from ramet.srt.weights.manifest import WeightBox, WeightEntry, WeightManifest, says_tied

FP8 = "float8_e4m3fn"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
SCALE_SUFFIXES = ("_scale", "_scale_inv")


@dataclass(frozen=True)
class WholeModel:
    """What a checkpoint must hold, and what the model's config says of its types."""

    shapes: dict[str, tuple[int, ...]]  # of all checkpoint tensors, scales too
    quantised: frozenset[str]  # the fp8 matrices among them
    is_tied: bool  # whether the output head is the embedding's table
    quantization: QuantizationConfig | None = None
    is_complete: bool = True  # False: only what one of several ranks needs is known
    knows_config: bool = True  # False: there is nothing but a manifest to go by
    surplus: str = ""  # a regular expression of names that the files may hold beside, if it isn't empty
    has_head: bool = True  # False: an output head that the files may hold is of no use

    @functools.cached_property
    def scales(self) -> frozenset[str]:
        """The names of scales."""
        return frozenset(name + suffix for name in self.quantised for suffix in SCALE_SUFFIXES) & self.shapes.keys()


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


def boxes_of(entries: Iterable[WeightEntry]) -> Iterable[tuple[WeightBox, str]]:
    """All boxes, each with the dtype of its entry."""
    return ((box, entry.dtype) for entry in entries for box in entry.boxes)


def collect_boxes(boxes: Iterable[tuple[WeightBox, str]], quantization: QuantizationConfig | None = None) -> WholeModel:
    """The model that boxes, each with its target's dtype, take everything of."""
    shapes: dict[str, tuple[int, ...]] = {}
    quantised = set()
    for box, dtype in boxes:
        name, reach = box.checkpoint_name, tuple(stop for _, stop in box.source)
        known = shapes.get(name)
        shapes[name] = reach if known is None else tuple(map(max, reach, known))
        if dtype == FP8:
            quantised.add(name)
    return WholeModel(shapes, frozenset(quantised), HEAD not in shapes, quantization)
