"""Owns planning with a seed that sends no manifest, as upstream's do: its tensors are matched by name and size."""

import logging

from ramet.srt.weights.agreement import find_other_head
from ramet.srt.weights.boxes import locate_box
from ramet.srt.weights.manifest import WeightManifest, element_size
from ramet.srt.weights.planner import Holding, PlanError, TensorSource
from ramet.srt.weights.registration import SeedAnswer

logger = logging.getLogger(__name__)


def source_from_names(name: str, answer: SeedAnswer, manifest: WeightManifest) -> TensorSource:
    """An upstream seed, which says of its tensors only name, address, element count and element size.

    A tensor of the same name and size is taken to be the same slice of the same checkpoint tensors.

    Raises:
        PlanError: if a tensor is missing or of another size, or the output head is not tied there.
    """
    holdings: dict[str, list[Holding]] = {}
    missing, different = [], []
    for entry in manifest.entries:
        found = answer.weights_info.get(entry.name)
        size = element_size(entry.dtype)
        if found is None:
            missing.append(entry.name)
        elif found[1] * found[2] != entry.nbytes or found[2] != size:
            different.append(f"{entry.name} ({found[1]} elements of {found[2]} bytes there, "
                             f"{entry.nbytes // size} of {size} here)")  # fmt: skip
        else:
            for box in entry.boxes:
                offset, strides = locate_box(entry, box)
                address = found[0] + offset - entry.offset
                holdings.setdefault(box.checkpoint_name, []).append(Holding(box.source, address, strides, entry.dtype))
    other_head = find_other_head(manifest, {name: info[0] for name, info in answer.weights_info.items()})
    if other_head is not None:
        different.append(other_head)
    if missing or different:
        raise PlanError(missing, different)
    logger.warning("%s sends no manifest: tensors are matched by name and size, their dtype and their "
                   "content could not be checked", name)  # fmt: skip
    return TensorSource(name=name, holdings=holdings)
