"""Owns loading a rank's weights from files, and the summary line of every load."""

import logging
import time

from ramet.srt.model_loader.arena.base import WeightArena
from ramet.srt.model_loader.checkpoint.source import CheckpointSource
from ramet.srt.weights.manifest import WeightManifest
from ramet.srt.weights.report import LoadReport, LoadResult

logger = logging.getLogger(__name__)


class DefaultModelLoader:
    """Reads safetensors files."""

    def load_weights(self, manifest: WeightManifest, arena: WeightArena, model_path: str) -> LoadResult:
        """Fill the arena; see ModelLoader."""
        start = time.perf_counter()
        source = CheckpointSource(model_path)
        transfer_plan = source.plan(manifest)
        source.fill(transfer_plan, arena)
        report = LoadReport(
            source=source.name, num_bytes=manifest.payload_nbytes, seconds=time.perf_counter() - start, verified=False
        )
        log_report(manifest, report)
        return LoadResult(report)


def log_report(manifest: WeightManifest, report: LoadReport) -> None:
    """The one summary line of a load."""
    given = zip(report.taken_from, report.taken_bytes, strict=True)
    logger.info(
        "rank %d: loaded %s weights from %s: %.3f GB in %.2f s, %.2f GB/s%s%s",
        manifest.parallel.world_rank,
        manifest.role,
        report.source,
        report.num_bytes / 1e9,
        report.seconds,
        report.num_bytes / 1e9 / max(report.seconds, 1e-9),
        ", checksums verified" if report.verified else "",
        "".join(f"; {num_bytes / 1e9:.3f} GB from {giver}" for giver, num_bytes in given),
    )
