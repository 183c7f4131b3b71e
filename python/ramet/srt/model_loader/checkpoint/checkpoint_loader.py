"""Owns loading a rank's weights from files."""

import functools
import time
from collections.abc import Callable
from typing import TypeAlias

from ramet.srt.model_loader.arena.base import WeightArena
from ramet.srt.model_loader.checkpoint.digest_store import required_table
from ramet.srt.model_loader.checkpoint.source import CheckpointSource
from ramet.srt.model_loader.checkpoint.whole_model import WholeModel
from ramet.srt.weights.manifest import WeightManifest
from ramet.srt.weights.report import LoadReport, LoadResult

OpenCheckpoint: TypeAlias = Callable[[str], CheckpointSource]  # by its folder


class CheckpointOpener:
    """Opens folders as checkpoints of one model, each once: what they hold is checked against all of the model."""

    def __init__(self, describe: Callable[[], WholeModel]) -> None:
        """
        Args:
            describe: what the files must hold; asked when the first is opened.
        """
        self._describe = functools.cache(describe)
        self._opened: dict[str, CheckpointSource] = {}

    def __call__(self, folder: str) -> CheckpointSource:
        """Raises ValueError if the folder holds another model, or none."""
        if folder not in self._opened:
            self._opened[folder] = CheckpointSource(folder, self._describe())
        return self._opened[folder]

    @property
    def whole(self) -> WholeModel:
        """What files of the model must hold."""
        return self._describe()

    def anew(self) -> "CheckpointOpener":
        """For the same model, with nothing opened: files may have changed."""
        return CheckpointOpener(self._describe)


class DefaultModelLoader:
    """Reads safetensors files.

    Args:
        weights_digest: see LoadConfig.
    """

    def __init__(
        self, open_checkpoint: OpenCheckpoint = CheckpointSource, *, weights_digest: str | None = None
    ) -> None:
        self._open_checkpoint = open_checkpoint
        self._weights_digest = weights_digest

    def load_weights(self, manifest: WeightManifest, arena: WeightArena, model_path: str) -> LoadResult:
        """Fill the arena; see ModelLoader."""
        start = time.perf_counter()
        table = required_table(model_path, self._weights_digest)
        source = self._open_checkpoint(model_path)
        transfer_plan = source.plan(manifest)
        source.fill(transfer_plan, arena)
        arena.checksums, arena.content_digest = None, table  # a seed that was given up may have left its own
        seconds = time.perf_counter() - start
        return LoadResult(LoadReport(source=source.name, num_bytes=manifest.payload_nbytes, seconds=seconds))
