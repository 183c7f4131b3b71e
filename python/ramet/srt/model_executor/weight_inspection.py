"""Owns looking at a rank's weights: numbers of one tensor, put together over the ranks of a replica, and checksums.

All ranks of a replica look between the same two passes, so what they say is of one version.
"""

import math
from collections.abc import Sequence

import msgspec
import torch

from ramet.srt.distributed.parallel_state import gather_over_replica
from ramet.srt.errors import one_line
from ramet.srt.model_executor.weight_update import RankVersions
from ramet.srt.model_loader.arena.base import WeightArena
from ramet.srt.weights.boxes import Region, region_volume
from ramet.srt.weights.inspection_messages import (
    CheckWeightsOutput,
    CheckWeightsReq,
    RankChecksums,
    RankReading,
    ReadWeightOutput,
    ReadWeightReq,
    WeightInspection,
    WeightInspectionOutput,
    WeightPart,
)
from ramet.srt.weights.manifest import WeightBox, WeightEntry, WeightManifest

MAX_NUMBERS = 1 << 22  # in an answer, which is text in the end


class WeightInspector:
    """A rank's side. It keeps the checksums of a snapshot, and no bytes."""

    def __init__(self, versions: RankVersions):
        self._versions = versions
        self._snapshot: dict[str, str] | None = None

    def inspect(self, question: WeightInspection) -> WeightInspectionOutput:
        """The answer of the replica, all of whose ranks call it with the same question."""
        if isinstance(question, ReadWeightReq):
            readings = gather_over_replica(msgspec.msgpack.encode(self._read(question)))
            ranks = [msgspec.msgpack.decode(one, type=RankReading) for one in readings]
            return put_together(question, ranks)
        checked = gather_over_replica(msgspec.msgpack.encode(self._check(question)))
        return CheckWeightsOutput(
            request_id=question.request_id, ranks=[msgspec.msgpack.decode(one, type=RankChecksums) for one in checked]
        )

    def _read(self, question: ReadWeightReq) -> RankReading:
        arena = self._versions.arena
        try:
            boxes = find_boxes(arena.manifest, question.name)
            with arena.reading(), arena.work_context():
                return RankReading(parts=read_parts(arena, boxes, question))
        except (ValueError, RuntimeError) as error:  # another rank waits for this one's answer
            return RankReading(failure=one_line(error))

    def _check(self, question: CheckWeightsReq) -> RankChecksums:
        arena = self._versions.arena
        entries, rank = arena.manifest.entries, arena.manifest.parallel.world_rank
        try:
            with arena.reading():
                found = dict(zip((one.name for one in entries), arena.hash_entries(entries), strict=True))
        except RuntimeError as error:
            return RankChecksums(rank=rank, checksums={}, failure=one_line(error))
        different: list[str] = []
        if question.action == "snapshot":
            self._snapshot = found
        elif question.action == "compare":
            if self._snapshot is None:
                return RankChecksums(rank=rank, checksums=found, failure="there is no snapshot to compare with")
            different = [name for name, value in found.items() if self._snapshot.get(name) != value]
        return RankChecksums(rank=rank, checksums=found, different=different)


def find_boxes(manifest: WeightManifest, name: str) -> list[tuple[int, WeightEntry, WeightBox]]:
    """Where a rank has what goes by a name: each box with the place of its checkpoint's tensor among all of them.

    A checkpoint's tensor is one by itself. One of the arena is what it is made of, each whole and in their order.

    Raises:
        ValueError: if what the arena's tensor is made of does not lie one below the other.
    """
    found = [(0, one, box) for one in manifest.entries for box in one.boxes if box.checkpoint_name == name]
    if found:
        return found
    entry = next((one for one in manifest.entries if name == one.name or name in one.aliases), None)
    if entry is None:
        return []
    boxes = sorted(entry.boxes, key=lambda box: box.target)
    names = list(dict.fromkeys(box.checkpoint_name for box in boxes))
    if len(names) > 1 and any(len(box.source) != len(box.target) for box in boxes):
        raise ValueError(f"{name} is a stack of tensors: ask for one of them, such as {names[0]}")
    return [(names.index(box.checkpoint_name), entry, box) for box in boxes]


def read_parts(
    arena: WeightArena, boxes: Sequence[tuple[int, WeightEntry, WeightBox]], question: ReadWeightReq
) -> list[WeightPart]:
    """The numbers in the first rows of some boxes. Raises ValueError if they are too many."""
    cuts: list[tuple[int, WeightEntry, WeightBox, Region]] = []
    for place, entry, box in boxes:
        region = first_rows(box.source, question.num_rows)
        if region_volume(region):
            cuts.append((place, entry, box, region))
    _check_size(sum(region_volume(region) for *_, region in cuts), question)
    parts = []
    for place, entry, box, region in cuts:
        view = arena.tensor(entry)[tuple(slice(start, stop) for start, stop in box.target)]
        shaped = view.reshape([stop - start for start, stop in box.source])
        rows = shaped[: region[0][1] - region[0][0]] if region else shaped
        parts.append(WeightPart(place, region, rows.float().cpu().contiguous().numpy().tobytes()))
    return parts


def first_rows(region: Region, num_rows: int) -> Region:
    """What of a region lies in the first rows of its tensor."""
    if not region:
        return region
    start, stop = region[0]
    return (start, max(start, min(stop, num_rows))), *region[1:]


def put_together(question: ReadWeightReq, ranks: Sequence[RankReading]) -> ReadWeightOutput:
    """A tensor over all ranks of a replica; where several have a part, they have the same."""

    def refuse(failure: str) -> ReadWeightOutput:
        return ReadWeightOutput(request_id=question.request_id, failure=failure)

    parts = [part for rank in ranks for part in rank.parts]
    if failures := dict.fromkeys(rank.failure for rank in ranks if rank.failure):
        return refuse("; ".join(failures))
    if not parts:
        return refuse(f"there is no tensor {question.name!r}, in the checkpoint's names or in those of this instance")
    try:
        tensors = [
            _whole([one for one in parts if one.place == at], question) for at in sorted({p.place for p in parts})
        ]
        whole = torch.cat(tensors)[: question.num_rows]
    except (ValueError, RuntimeError) as error:  # parts of different widths
        return refuse(f"{question.name}: {one_line(error)}")
    return ReadWeightOutput(
        request_id=question.request_id, shape=tuple(whole.shape), values=whole.contiguous().numpy().tobytes()
    )


def _whole(parts: Sequence[WeightPart], question: ReadWeightReq) -> torch.Tensor:
    """A checkpoint's tensor of its parts. Raises ValueError if they leave something out, or are too many numbers."""
    num_dims = len(parts[0].region)
    shape = [max(part.region[dim][1] for part in parts) for dim in range(num_dims)] or [1]
    _check_size(math.prod(shape), question)
    whole, is_there = torch.empty(shape), torch.zeros(shape, dtype=torch.bool)
    for part in parts:
        place = tuple(slice(start, stop) for start, stop in part.region)
        values = torch.frombuffer(bytearray(part.values), dtype=torch.float32)
        whole[place] = values.reshape([stop - start for start, stop in part.region] or [1])
        is_there[place] = True
    if not is_there.all():
        raise ValueError("the ranks of this replica don't have all of it")
    return whole


def _check_size(num_numbers: int, question: ReadWeightReq) -> None:
    if num_numbers > MAX_NUMBERS:
        raise ValueError(
            f"{question.num_rows} rows of {question.name} are {num_numbers} numbers, and at most {MAX_NUMBERS} are "
            "told: choose a smaller truncate_size"
        )
