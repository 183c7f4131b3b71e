"""Owns taking a rank's weights from running instances, whoever finds them, and reading files when that fails."""

import contextlib
import logging
import time
from typing import Any

import msgspec

from ramet.srt.configs.load_config import LoadConfig
from ramet.srt.model_loader.arena.base import WeightArena
from ramet.srt.model_loader.checkpoint.checkpoint_loader import DefaultModelLoader, OpenCheckpoint
from ramet.srt.model_loader.checkpoint.source import CheckpointSource
from ramet.srt.model_loader.client.attempt import Attempt
from ramet.srt.model_loader.client.digest_check import DigestCheck
from ramet.srt.model_loader.client.fan_out import DoorOpener
from ramet.srt.model_loader.client.seed_finder import FinderMaker, SeedFinder
from ramet.srt.model_loader.client.transfer import combine_errors
from ramet.srt.model_loader.client.version_check import VersionSwitched
from ramet.srt.utils.hub import resolve_model_path
from ramet.srt.weights.errors import WeightTransferError
from ramet.srt.weights.manifest import WeightManifest
from ramet.srt.weights.report import LoadReport, LoadResult

logger = logging.getLogger(__name__)

MAX_SWITCHES = 5  # of a candidate's weights, before another one is tried


class RemoteInstanceModelLoader:
    """Takes a rank's weights from the ranks of seed instances; from disk when that fails, unless told not to."""

    def __init__(
        self,
        config: LoadConfig,
        make_finder: FinderMaker,
        open_checkpoint: OpenCheckpoint = CheckpointSource,
        open_doors: DoorOpener | None = None,
    ) -> None:
        """
        Args:
            make_finder: makes, for each load, who finds seeds.
            open_checkpoint: opens files, where they are read.
            open_doors: see Attempt.
        """
        self._open_doors = open_doors
        self._open_checkpoint = open_checkpoint
        self._config = config
        self._make_finder = make_finder

    def load_weights(self, manifest: WeightManifest, arena: WeightArena, model_path: str) -> LoadResult:
        """Fill the arena in place; see ModelLoader."""
        with contextlib.closing(self._make_finder(manifest, model_path)) as finder:
            try:
                return LoadResult(self._fill(finder, arena, model_path), finder.claim)
            except BaseException:
                if finder.claim is not None:
                    finder.claim.release()
                raise

    def load_model_from_modelexpress(self, manifest: WeightManifest, arena: WeightArena, model_path: str) -> LoadResult:
        """`load_weights` by SGLang's name for it. Whether a metadata server is asked, the finder's maker decides."""
        return self.load_weights(manifest, arena, model_path)

    def _fill(self, finder: SeedFinder[Any], arena: WeightArena, model_path: str) -> LoadReport:
        start = time.perf_counter()
        rank = arena.manifest.parallel.world_rank
        errors: list[WeightTransferError] = []
        attempt: Attempt | None = None
        digest = DigestCheck(self._config, model_path, rank)
        for candidate in finder.candidates():
            try:
                for num_left in range(MAX_SWITCHES, -1, -1):
                    attempt = Attempt(finder.open(candidate), arena, self._config, digest, self._open_checkpoint,
                                      self._open_doors)  # fmt: skip
                    try:
                        return attempt.run(model_path)
                    except VersionSwitched as error:
                        if not num_left:
                            raise
                        logger.info("rank %d: starting over: %s", rank, error)
            except WeightTransferError as error:
                finder.give_up(candidate, error)
                errors.append(error)
        shortage = finder.shortage()
        if shortage is not None:
            errors.append(shortage)
        if not errors:
            logger.info("rank %d: no instance has the weights of %s yet: reading the files", rank,
                        arena.manifest.model_name)  # fmt: skip
            return self._read_all(arena, self._fetch_files(model_path))
        reason = combine_errors(rank, errors)
        if self._config.fallback == "error":
            raise reason
        logger.warning("rank %d: no weights from %s, loading from disk instead: %s", rank, finder.origin, reason)
        report = self._fill_from_disk(arena, model_path, attempt, reason, start)
        return msgspec.structs.replace(report, fallback_reason=str(reason))

    def _fill_from_disk(
        self,
        arena: WeightArena,
        model_path: str,
        last: Attempt | None,
        reason: WeightTransferError,
        start: float,
    ) -> LoadReport:
        """Read what the last attempt has not got, or everything, if it has nothing that can be used."""
        try:
            folder = self._fetch_files(model_path)
            finished = None if last is None else last.finish_from_disk(folder)
            if finished is None:
                return self._read_all(arena, folder)
        except ValueError as error:
            raise ValueError(f"no weights from the seed ({reason}), and none from disk ({error})") from error
        return msgspec.structs.replace(finished, seconds=time.perf_counter() - start)

    def _fetch_files(self, model_path: str) -> str:
        """The folder of the weights, from the hub if they have not been needed so far."""
        return resolve_model_path(self._config.model_path or model_path, self._config.revision)

    def _read_all(self, arena: WeightArena, folder: str) -> LoadReport:
        loader = DefaultModelLoader(self._open_checkpoint, weights_digest=self._config.weights_digest)
        return loader.load_weights(arena.manifest, arena, folder).report
