"""Owns giving a rank's memory back and taking it again: that of its weights, and that of its KV cache.

What comes back as weights is compared, all of it, with what was there. Until that is so the arena stays without memory.
"""

import dataclasses
import logging
import time
from collections.abc import Sequence

import msgspec
import torch

from ramet.srt.configs.load_config import LoadConfig
from ramet.srt.errors import one_line
from ramet.srt.mem_cache.memory_pool import TokenToKVPool
from ramet.srt.mem_cache.state_pool import StatePool
from ramet.srt.model_executor.rank_weights import RankWeights
from ramet.srt.model_loader.arena.base import WeightArena
from ramet.srt.model_loader.checkpoint.checkpoint_loader import CheckpointOpener
from ramet.srt.model_loader.checksums.entries import compute_checksums
from ramet.srt.model_loader.loader import get_model_loader
from ramet.srt.utils.hub import resolve_model_path
from ramet.srt.utils.net import SeedAddress
from ramet.srt.weights.errors import name_some
from ramet.srt.weights.manifest import WeightChecksums
from ramet.srt.weights.memory_messages import MemoryStep, ReleaseMemoryReq, ResumeMemoryReq, StartSource, WakeSource
from ramet.srt.weights.report import LoadReport, summarize
from ramet.srt.weights.update_messages import FilesSource, InstanceSource
from ramet.srt.weights.version import DEFAULT_VERSION

logger = logging.getLogger(__name__)

COPY = "host_memory"  # where weights come from that were copied there


@dataclasses.dataclass(frozen=True)
class Moved:
    """What a step has done."""

    num_bytes: int  # given back, or that came as weights
    source: str = ""  # of weights
    seconds: float = 0.0


class RankMemory:
    """The memory of one rank.

    Args:
        start: where the weights that the rank was started with came from, and their arena.
        model_path: the files then.
        pools: what the tag "kv_cache" is about: keys and values, and states of linear layers.
        open_checkpoint: opens files as checkpoints of the rank's model.
        keeps_room: host memory that was taken for a copy stays, for the next one.
    """

    def __init__(
        self,
        start: RankWeights,
        model_path: str,
        pools: Sequence[TokenToKVPool | StatePool],
        open_checkpoint: CheckpointOpener,
        *,
        keeps_room: bool,
    ):
        self._start = start
        self._model_path = model_path
        self._pools = pools
        self._open_checkpoint = open_checkpoint
        self._keeps_room = keeps_room

    @property
    def _arena(self) -> WeightArena:
        return self._start.arena

    def take(self, step: MemoryStep) -> Moved:
        """Take a step, while no pass is under way that this thread has not been told of, and none is planned.

        What is as wished already stays as it is.

        Raises:
            ValueError, OSError, MemoryError, RuntimeError: if it can't be taken. Of several tags, some may have been.
        """
        begun = time.perf_counter()
        moved = self._release(step) if isinstance(step, ReleaseMemoryReq) else self._resume(step)
        return dataclasses.replace(moved, seconds=time.perf_counter() - begun)

    def _release(self, step: ReleaseMemoryReq) -> Moved:
        arena, num_bytes = self._arena, 0
        device = self._start.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if "weights" in step.tags and not arena.is_put_away:
            arena.checksums = arena.checksums or compute_checksums(arena.manifest, arena)
            arena.put_away(keeps_copy=step.keeps_copy)
            is_kept = step.keeps_copy and device.type == "cpu"  # the copy is the memory itself
            num_bytes += 0 if is_kept else arena.nbytes
        for pool in self._pools if "kv_cache" in step.tags else ():
            if not pool.is_put_away:
                pool.put_away()
                num_bytes += pool.buffer.nbytes
        if device.type == "cuda":
            torch.cuda.empty_cache()
            logger.info("rank %d: %.2f GB of GPU memory stay: graphs, adapters, and what libraries hold",
                        self._rank, torch.cuda.memory_reserved(device) / 1e9)  # fmt: skip
        logger.info("rank %d: gave %.3f GB of memory back", self._rank, num_bytes / 1e9)
        return Moved(num_bytes)

    @property
    def _rank(self) -> int:
        return self._arena.manifest.parallel.world_rank

    def _resume(self, step: ResumeMemoryReq) -> Moved:
        begun = time.perf_counter()
        if "kv_cache" in step.tags and any(pool.is_put_away for pool in self._pools):
            for pool in self._pools:
                pool.take_back()
            logger.info("rank %d: the KV cache is back after %.3f s", self._rank, time.perf_counter() - begun)
        if "weights" not in step.tags or not self._arena.is_put_away:
            return Moved(0)
        report = self._wake_weights(step.sources)
        self._arena.drop_copy(keeps_room=self._keeps_room)
        seconds = time.perf_counter() - begun
        logger.info("rank %d: the weights are back after %.3f s, %s", self._rank, seconds, summarize(report))
        return Moved(report.num_bytes, report.source)

    def _wake_weights(self, sources: list[WakeSource]) -> LoadReport:
        """Have the same weights again. Raises ValueError if nobody has them: there are none then."""
        failures = []
        try:
            if (report := self._from_copy()) is not None:
                return report
        except ValueError as error:
            failures.append(str(error))
        for source in sources:
            try:
                return self._from_source(source)
            except (ValueError, OSError, MemoryError, RuntimeError) as error:
                failures.append(f"{_name(source)}: {one_line(error)}")
                logger.warning("rank %d: no weights from %s", self._rank, failures[-1])
        raise ValueError("; ".join(failures) or "nobody is known who has the weights")

    def _from_copy(self) -> LoadReport | None:
        """None if there is no copy. Raises ValueError if it is not what was there."""
        begun, arena = time.perf_counter(), self._arena
        assert arena.checksums is not None
        if not arena.take_back():
            return None
        try:
            _compare(arena, arena.checksums)
        except ValueError as error:
            arena.put_away(keeps_copy=False)
            raise ValueError(f"the copy in host memory: {error}") from None
        seconds = time.perf_counter() - begun
        return LoadReport(source=COPY, num_bytes=arena.manifest.payload_nbytes, seconds=seconds, verified=True)

    def _from_source(self, source: WakeSource) -> LoadReport:
        """Raises ValueError, OSError, MemoryError or RuntimeError if it can't give the weights that were there."""
        arena = self._arena
        manifest, checksums, content_digest = arena.manifest, arena.checksums, arena.content_digest
        assert checksums is not None
        # By whatever name others have them.
        wanted = msgspec.structs.replace(manifest, checksums=None, weight_version=DEFAULT_VERSION)
        stage = arena.open_stage(wanted)
        report = self._fill(stage, source)
        _compare(stage, checksums)
        arena.exchange(stage)
        arena.manifest, arena.checksums, arena.content_digest = manifest, checksums, content_digest
        return msgspec.structs.replace(report, verified=True)

    def _fill(self, stage: WeightArena, source: WakeSource) -> LoadReport:
        base, opener = self._start.config.load, self._open_checkpoint.anew()
        match source:
            case StartSource():
                start = dataclasses.replace(self._start, manifest=stage.manifest, arena=stage, open_checkpoint=opener)
                loaded = start.load(self._model_path)
                loaded.close()
                return loaded.report
            case InstanceSource():
                config = instance_config(base, source)
                return get_model_loader(config, open_checkpoint=opener).load_weights(stage.manifest, stage, "").report
            case FilesSource():
                config = dataclasses.replace(base, load_format="safetensors", weights_digest=None)
                folder = resolve_model_path(source.path, source.revision)
                loader = get_model_loader(config, open_checkpoint=opener)
                return loader.load_weights(stage.manifest, stage, folder).report


def _compare(arena: WeightArena, expected: WeightChecksums) -> None:
    """Raises ValueError unless the arena holds what has those checksums."""
    names = [entry.name for entry in arena.manifest.entries]
    pairs = zip(names, compute_checksums(arena.manifest, arena).values, expected.values, strict=True)
    if wrong := [name for name, one, other in pairs if one != other]:
        raise ValueError(f"other weights than before: {name_some(wrong)} differ")


def _name(source: WakeSource) -> str:
    match source:
        case StartSource():
            return "where they came from at the start"
        case InstanceSource():
            return f"{source.host}:{source.port}"
        case FilesSource():
            return source.path


def instance_config(base: LoadConfig, source: InstanceSource) -> LoadConfig:
    """How to load from that instance alone."""
    return dataclasses.replace(
        base,
        load_format="remote_instance",
        seeds=(SeedAddress(source.host, source.port, source.scheme),),
        send_weights_group_ports=(),
        fallback="error",
        weights_digest=source.digest,
        shows_keys=not source.is_listed,
        is_update=True,
        modelexpress_url=None,
    )
