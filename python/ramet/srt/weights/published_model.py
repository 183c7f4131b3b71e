"""Owns what the ranks of a trainer have together, and what they lack. Pure functions on what each says of itself."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ramet.srt.weights.boxes import Region, share_out
from ramet.srt.weights.errors import name_some
from ramet.srt.weights.manifest import WeightBox, WeightManifest
from ramet.srt.weights.registration import SeedAnswer

TRAINER = "the trainer"


@dataclass(frozen=True)
class WholeTensor:
    """A tensor of a trainer, over all its ranks."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def tensors_of(answers: Sequence[SeedAnswer]) -> list[WholeTensor]:
    """The tensors that all ranks of a trainer have together.

    Raises:
        ValueError: if they contradict each other.
    """
    found: dict[str, WholeTensor] = {}
    for answer in answers:
        assert answer.published is not None and answer.manifest is not None
        for dtype, box in _boxes_of(answer.manifest):
            shape = answer.published.shapes.get(box.checkpoint_name)
            if shape is None or len(shape) != len(box.source):
                raise ValueError(f"{TRAINER} does not say the shape of {box.checkpoint_name}")
            one = WholeTensor(box.checkpoint_name, dtype, shape)
            if found.setdefault(one.name, one) != one:
                raise ValueError(f"{TRAINER}'s ranks have {one.name} in different shapes or types")
    return list(found.values())


def find_gap(answers: Sequence[SeedAnswer]) -> str | None:
    """What no rank of a trainer has of the tensors that they speak of together; None if nothing is missing.

    Raises:
        ValueError: if they contradict each other.
    """
    wholes = {one.name: tuple((0, extent) for extent in one.shape) for one in tensors_of(answers)}
    held: dict[str, list[tuple[None, Region]]] = {name: [] for name in wholes}
    for answer in answers:
        assert answer.manifest is not None
        for _, box in _boxes_of(answer.manifest):
            held[box.checkpoint_name].append((None, box.source))
    lacking = [name for name, offers in held.items() if share_out(wholes[name], offers)[1]]
    return name_some(sorted(lacking)) if lacking else None


def _boxes_of(manifest: WeightManifest) -> Iterator[tuple[str, WeightBox]]:
    """Each with the dtype of its entry."""
    return ((entry.dtype, box) for entry in manifest.entries for box in entry.boxes)
