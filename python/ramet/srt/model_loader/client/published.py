"""Owns filling an arena from what a trainer's ranks publish, by the rules by which files are loaded.

What the instance holds as the trainer does is taken straight into its place. What is cast, or quantised here over whole
rows, lands beside it first, a bounded part at a time. All of it is compared with the trainer's own checksums.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from msgspec.structs import replace

from ramet.srt.configs.load_config import LoadConfig
from ramet.srt.model_loader.arena.allocate import allocate_arena
from ramet.srt.model_loader.arena.base import WeightArena
from ramet.srt.model_loader.checkpoint.cache_scale_check import check_cache_scales
from ramet.srt.model_loader.checkpoint.cache_scales import is_cache_scale
from ramet.srt.model_loader.checkpoint.whole_model import WholeModel, grids_of
from ramet.srt.model_loader.client.open_sources import SeedSources
from ramet.srt.model_loader.client.published_names import PublishedNames
from ramet.srt.model_loader.client.seed_instance import SeedInstance
from ramet.srt.model_loader.client.transfer import SeedTransfer
from ramet.srt.model_loader.client.verification import verify_by_regions
from ramet.srt.model_loader.tensor_stage import cast_values, quantised_pieces
from ramet.srt.utils.net import SeedAddress
from ramet.srt.weights.boxes import Region, region_volume
from ramet.srt.weights.manifest import (
    WeightBox,
    WeightEntry,
    WeightManifest,
    build_weight_manifest,
    element_size,
)
from ramet.srt.weights.published_model import TRAINER, tensors_of
from ramet.srt.weights.registration import SeedAnswer
from ramet.srt.weights.report import LoadReport

LANDING_BYTES = 256 << 20  # of what is cast or quantised here, at a time
MAX_ASKED_AT_ONCE = 16


@dataclass(frozen=True)
class Landing:
    """A part of the trainer's that is made into something else here, as build_weight_manifest takes it."""

    entry: WeightEntry
    scale: WeightEntry | None  # of a matrix that is quantised here
    box: WeightBox  # of the entry
    region: Region  # that lands, of the tensor that the box names
    dtype: str
    shape: tuple[int, ...]
    boxes: tuple[WeightBox, ...]  # by the trainer's own tensor

    @property
    def nbytes(self) -> int:
        return region_volume(self.region) * element_size(self.dtype)


@dataclass(frozen=True)
class PullPlan:
    """What a rank takes from a trainer."""

    direct: WeightManifest  # what is copied, by the trainer's tensors
    landings: tuple[Landing, ...]
    ones: tuple[tuple[WeightEntry, Region], ...]  # scales of the KV cache that the trainer has not


def plan_pull(manifest: WeightManifest, answers: Sequence[SeedAnswer], whole: WholeModel) -> PullPlan:
    """What a rank takes from a trainer, and how. Which rank gives which bytes of it, the planner says.

    Args:
        answers: of all ranks of the trainer.

    Raises:
        ValueError: if the trainer's tensors are not those of the model, or can't be taken apart.
    """
    names = PublishedNames(tensors_of(answers), whole)
    entries = {entry.name: entry for entry in manifest.entries}
    grids = grids_of(entries) if names.is_quantised_here else {}
    made = {grid for beside in grids.values() for grid in beside}
    direct, landings, ones = [], list[Landing](), list[tuple[WeightEntry, Region]]()
    for entry in manifest.entries:
        boxes = [box for box in entry.boxes if region_volume(box.source)]
        absent = [box for box in boxes if is_cache_scale(box.checkpoint_name) and not names.has(box.checkpoint_name)]
        ones += [(entry, box.target) for box in absent]
        if entry.name in grids:
            scale = entries[grids[entry.name][0]]
            landings += [_land(names, entry, scale, box) for box in boxes]
        elif entry.name in made:
            continue
        elif absent:
            landings += [_land(names, entry, None, box) for box in boxes if box not in absent]
        elif all(names.dtype(box.checkpoint_name) == entry.dtype for box in boxes):
            direct.append(replace(entry, boxes=tuple(names.translate(box) for box in boxes)))
        else:
            landings += [_land(names, entry, None, box) for box in boxes]
    return PullPlan(replace(manifest, entries=tuple(direct)), tuple(landings), tuple(ones))


def _land(names: PublishedNames, entry: WeightEntry, scale: WeightEntry | None, box: WeightBox) -> Landing:
    region = box.source
    if scale is not None:  # its scales are those of whole rows, however few columns are here
        region = (region[0], (0, names.shape(box.checkpoint_name)[1]))
    shape = tuple(stop - start for start, stop in region)
    whole = tuple((0, extent) for extent in shape)
    translated = names.translate(WeightBox(box.checkpoint_name, region, whole))
    return Landing(entry, scale, box, region, names.dtype(box.checkpoint_name), shape, (translated,))


def take_published(
    stage: WeightArena, addresses: Sequence[SeedAddress], version: str, config: LoadConfig, whole: WholeModel
) -> LoadReport:
    """Fill a private arena with a version that a trainer publishes, and compare it.

    Args:
        addresses: of all ranks of the trainer.
        whole: the model that all ranks of this instance hold together.

    Raises:
        ValueError: if that is another model, or does not come whole.
        WeightTransferError: if ranks of the trainer fail, or publish another version by now.
        MemoryError: if the weights don't fit into memory.
    """
    start = time.perf_counter()
    seeds = [SeedInstance(address, config, stage.manifest) for address in addresses]
    with ThreadPoolExecutor(min(MAX_ASKED_AT_ONCE, len(seeds))) as pool:
        answers = list(pool.map(SeedInstance.ask_trainer, seeds))
    others = {answer.manifest.weight_version for answer in answers if answer.manifest is not None} - {version}
    if others:
        raise ValueError(f"the trainer publishes {min(others)} now, not {version}")
    pull = plan_pull(stage.manifest, answers, whole)
    report = LoadReport(source="", num_bytes=0, seconds=0.0, verified=True, weight_version=version)
    with _showing(stage, pull.direct):
        report = _add(report, _move(stage, seeds, config))
    for group in _groups(pull.landings):
        landing = allocate_arena(_landing_manifest(stage.manifest, group), stage.byte_tensor().device)
        report = _add(report, _move(landing, seeds, config))
        with stage.work_context(), torch.no_grad():
            for one, entry in zip(group, landing.manifest.entries, strict=True):
                _make(one, landing.tensor(entry), stage)
            stage.synchronize()
    with stage.work_context(), torch.no_grad():
        for entry, region in pull.ones:
            _put(stage, entry, region, torch.ones(()))
        stage.synchronize()
    check_cache_scales(stage, TRAINER)
    return replace(report, seconds=time.perf_counter() - start)


@contextlib.contextmanager
def _showing(arena: WeightArena, manifest: WeightManifest) -> Iterator[None]:
    """While a private arena's tensors go by the trainer's names."""
    own, arena.manifest = arena.manifest, manifest
    try:
        yield
    finally:
        arena.manifest = own


def _move(arena: WeightArena, seeds: Sequence[SeedInstance], config: LoadConfig) -> SeedTransfer:
    """Fill an arena whose boxes are of the trainer's tensors, and compare it."""
    transfer = SeedTransfer(arena, seeds, lambda: SeedSources(arena, config))
    transfer.run()
    together = SeedInstance(seeds[0].server.address, config, arena.manifest)
    together.name = ", ".join(seed.name for seed in transfer.alive)
    together.ranks = [rank for seed in transfer.alive for rank in seed.ranks]
    if not verify_by_regions(arena, arena.manifest.entries, [together], config):
        raise ValueError("the trainer's checksums are of another kind than this device's")
    return transfer


def _add(report: LoadReport, transfer: SeedTransfer) -> LoadReport:
    given = dict(zip(report.taken_from, report.taken_bytes, strict=True))
    for name, nbytes in transfer.given_nbytes({}).items():
        given[name] = given.get(name, 0) + nbytes
    names = dict.fromkeys([*filter(None, report.source.split("+")), *transfer.source_names])
    return replace(
        report,
        source="+".join(names),
        num_bytes=report.num_bytes + transfer.planned_nbytes,
        transfer_seconds=report.transfer_seconds + transfer.transfer_seconds,
        taken_from=tuple(given),
        taken_bytes=tuple(given.values()),
    )


def _groups(landings: Sequence[Landing]) -> Iterator[list[Landing]]:
    group, nbytes = list[Landing](), 0
    for one in landings:
        if group and nbytes + one.nbytes > LANDING_BYTES:
            yield group
            group, nbytes = [], 0
        group.append(one)
        nbytes += one.nbytes
    if group:
        yield group


def _landing_manifest(own: WeightManifest, group: Sequence[Landing]) -> WeightManifest:
    return build_weight_manifest(
        [(f"{number} {one.entry.name}", one) for number, one in enumerate(group)],
        model_name=own.model_name,
        revision="",
        dtype=own.dtype,
        quantization="",
        role=own.role,
        parallel=own.parallel,
    )


def _make(one: Landing, landed: torch.Tensor, stage: WeightArena) -> None:
    """Put what is made of a part in its place."""
    source = tuple((a - first, b - first) for (a, b), (first, _) in zip(one.box.source, one.region, strict=True))
    box = replace(one.box, source=source)
    if one.scale is None:
        _put(stage, one.entry, box.target, cast_values(one.entry, box, landed))
        return
    for entry, region, values in quantised_pieces(one.entry, one.scale, box, landed):
        _put(stage, entry, region, values)


def _put(stage: WeightArena, entry: WeightEntry, region: Region, values: torch.Tensor) -> None:
    target = stage.tensor(entry)[tuple(slice(start, stop) for start, stop in region)]
    target.copy_(values.to(target.dtype).reshape(target.shape))
