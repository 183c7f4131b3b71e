"""Owns loading a rank's weights from files."""

import time

from ramet.srt.model_loader.arena.base import WeightArena
from ramet.srt.model_loader.checkpoint.digest_store import required_table
from ramet.srt.model_loader.checkpoint.source import CheckpointSource
from ramet.srt.weights.manifest import WeightManifest
from ramet.srt.weights.report import LoadReport, LoadResult


class DefaultModelLoader:
    """Reads safetensors files.

    Args:
        weights_digest: see LoadConfig.
    """

    def __init__(self, weights_digest: str | None = None) -> None:
        self._weights_digest = weights_digest

    def load_weights(self, manifest: WeightManifest, arena: WeightArena, model_path: str) -> LoadResult:
        """Fill the arena; see ModelLoader."""
        start = time.perf_counter()
        table = required_table(model_path, self._weights_digest)
        source = CheckpointSource(model_path)
        transfer_plan = source.plan(manifest)
        source.fill(transfer_plan, arena)
        arena.checksums, arena.content_digest = None, table  # a seed that was given up may have left its own
        seconds = time.perf_counter() - start
        return LoadResult(LoadReport(source=source.name, num_bytes=manifest.payload_nbytes, seconds=seconds))
