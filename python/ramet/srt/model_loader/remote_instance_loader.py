"""Owns taking a rank's weights from running instances: which way, what is checked, and what follows a failure."""

import contextlib
import logging
import time
from typing import TYPE_CHECKING

import msgspec

from ramet.srt.configs.load_config import LoadConfig, LoadContext
from ramet.srt.model_loader.arena.base import WeightArena
from ramet.srt.model_loader.checkpoint.checkpoint_loader import DefaultModelLoader, log_report
from ramet.srt.model_loader.checkpoint.source import CheckpointSource
from ramet.srt.model_loader.client.open_sources import SeedSources, open_local
from ramet.srt.model_loader.client.seed_instance import SeedInstance
from ramet.srt.model_loader.client.seeds_by_address import find_seeds
from ramet.srt.model_loader.client.transfer import SeedTransfer, combine_errors
from ramet.srt.model_loader.client.verification import ChecksumMismatch, verify_by_entries, verify_by_regions
from ramet.srt.modelexpress.settings import check_installed
from ramet.srt.utils.hub import has_weights, resolve_model_path
from ramet.srt.utils.net import format_address
from ramet.srt.weights.agreement import is_folder_name
from ramet.srt.weights.errors import WeightTransferError
from ramet.srt.weights.manifest import WeightManifest
from ramet.srt.weights.report import LoadReport

if TYPE_CHECKING:
    from ramet.srt.modelexpress.client.claim import FileClaim
    from ramet.srt.modelexpress.client.seed_search import SeedSearch

logger = logging.getLogger(__name__)


class RemoteInstanceModelLoader:
    """Takes a rank's weights from the ranks of seed instances; from disk when that fails, unless told not to."""

    def __init__(self, config: LoadConfig, context: LoadContext | None = None) -> None:
        if not config.seeds and config.modelexpress_url is None:
            raise ValueError("loading from a remote instance needs the seed's address and port, or ModelExpress")
        self._config = config
        self._context = context or LoadContext()
        self.claim: FileClaim | None = None  # to read the files; to be kept until this instance is a source itself
        self.seed = ", ".join(format_address(host, port) for host, port in config.seeds)
        self._broken_off: SeedTransfer | None = None  # a transfer that has filled a part of the arena
        self._given: dict[str, int] = {}  # what it has filled: bytes by giver
        self._seeds: list[SeedInstance] = []
        self._worker_ids: dict[int, str] = {}  # of the seed's ranks, where a metadata server has listed it
        self._start = 0.0

    def load_weights(self, manifest: WeightManifest, arena: WeightArena, model_path: str) -> LoadReport:
        """Fill the arena in place; see ModelLoader."""
        self._broken_off = None
        self._start = time.perf_counter()
        if self._config.modelexpress_url is not None:
            return self.load_model_from_modelexpress(manifest, arena, model_path)
        try:
            report = self._load_from_seeds(find_seeds(self._config, manifest), manifest, arena, model_path)
        except WeightTransferError as error:
            if self._config.fallback == "error":
                raise
            logger.warning(
                "rank %d: no weights from the seed %s, loading from disk instead: %s",
                manifest.parallel.world_rank,
                self.seed,
                error,
            )
            return self._load_from_disk(manifest, arena, model_path, error)
        log_report(manifest, report)
        return report

    def load_model_from_modelexpress(self, manifest: WeightManifest, arena: WeightArena, model_path: str) -> LoadReport:
        """Fill the arena from an instance that the metadata server lists, or else from files; see ModelLoader."""
        check_installed()
        from ramet.srt.modelexpress.client.publication import make_instance_facts
        from ramet.srt.modelexpress.client.seed_search import SeedSearch

        facts = make_instance_facts(self._context.instance_url, self._context.started_at, manifest)
        can_read_files = self._config.fallback == "disk" and has_weights(self._config.model_path or model_path)
        search = SeedSearch(self._config, manifest, facts, self._context.board, can_read_files=can_read_files)
        self.claim = search.claim
        with contextlib.closing(search):
            try:
                return self._load_from_candidates(search, manifest, arena, model_path)
            except BaseException:
                self.release_claim()
                raise

    def _load_from_candidates(
        self, search: "SeedSearch", manifest: WeightManifest, arena: WeightArena, model_path: str
    ) -> LoadReport:
        rank, errors = manifest.parallel.world_rank, []
        for candidate in search.candidates():
            self.seed = candidate.name
            try:
                seeds = [search.open(candidate)]
                self._worker_ids = candidate.worker_ids
                report = self._load_from_seeds(seeds, manifest, arena, model_path)
            except WeightTransferError as error:
                logger.warning("rank %d: no weights from the source %s, trying the next: %s", rank, self.seed, error)
                errors.append(error)
                search.give_up(candidate)
                continue
            log_report(manifest, report)
            return report
        if search.reason:
            where = f"the sources at the ModelExpress server {search.client.address}"
            errors.append(WeightTransferError("find", rank, where, search.reason))
        if self._config.fallback == "error":
            raise combine_errors(rank, errors)
        if errors:
            reason = combine_errors(rank, errors)
            logger.warning("rank %d: no weights from other instances, loading from disk instead: %s", rank, reason)
            return self._load_from_disk(manifest, arena, model_path, reason)
        logger.info("rank %d: no instance has the weights of %s yet: reading the files", rank, manifest.model_name)
        return DefaultModelLoader().load_weights(manifest, arena, self._fetch_files(model_path))

    def release_claim(self) -> None:
        """Let another instance read the files. Idempotent."""
        if self.claim is not None:
            self.claim.release()

    def _fetch_files(self, model_path: str) -> str:
        """The folder of the weights, from the hub if they have not been needed so far."""
        return resolve_model_path(self._config.model_path or model_path, self._config.revision)

    def _load_from_disk(
        self, manifest: WeightManifest, arena: WeightArena, model_path: str, reason: WeightTransferError
    ) -> LoadReport:
        try:
            model_path = self._fetch_files(model_path)
            report = self._finish_from_disk(manifest, arena, model_path)
            if report is None:
                report = DefaultModelLoader().load_weights(manifest, arena, model_path)
        except ValueError as error:
            raise ValueError(f"no weights from the seed ({reason}), and none from disk ({error})") from error
        return msgspec.structs.replace(report, fallback_reason=str(reason))

    def _finish_from_disk(self, manifest: WeightManifest, arena: WeightArena, model_path: str) -> LoadReport | None:
        """Read only what the seeds have not sent. None if they sent nothing that can be used, or have other weights."""
        broken_off = self._broken_off
        if broken_off is None or not broken_off.received_nbytes:
            return None
        disk = CheckpointSource(model_path)
        rest = disk.plan(manifest, broken_off.unfinished)
        disk.fill(rest, arena)
        try:
            unknown = verify_by_entries(arena, self._manifests(), self.seed)
        except ChecksumMismatch as error:
            logger.info("rank %d: the files are not what the seed has: reading all of them (%s)",
                        manifest.parallel.world_rank, error)  # fmt: skip
            return None
        if unknown:
            return None
        report = LoadReport(
            source="+".join([*broken_off.source_names, disk.name]),
            num_bytes=broken_off.received_nbytes + rest.nbytes,
            seconds=time.perf_counter() - self._start,
            verified=True,
            taken_from=tuple(self._given),
            taken_bytes=tuple(self._given.values()),
        )
        log_report(manifest, report)
        return report

    def _load_from_seeds(
        self, seeds: list[SeedInstance], manifest: WeightManifest, arena: WeightArena, model_path: str
    ) -> LoadReport:
        self._seeds = seeds
        start = time.perf_counter()
        report = self._map(arena) or self._transfer(arena)
        is_upstream = any(rank.answer.manifest is None for seed in self._seeds for rank in seed.ranks)
        if is_upstream or any(
            seed_manifest.model_name != manifest.model_name and is_folder_name(manifest, seed_manifest)
            for seed_manifest in self._manifests()
        ):
            self._compare_with_files(manifest, arena, model_path)
        return msgspec.structs.replace(report, seconds=time.perf_counter() - start)

    def _manifests(self) -> list[WeightManifest]:
        answers = [rank.answer for seed in self._seeds for rank in seed.ranks]
        return [answer.manifest for answer in answers if answer.manifest is not None]

    def _compare_with_files(self, manifest: WeightManifest, arena: WeightArena, model_path: str) -> None:
        """Where names can't tell one model from another of the same shape, own files can, if there are any.

        Raises:
            WeightTransferError: if the files hold other weights.
        """
        rank = manifest.parallel.world_rank
        try:
            different = CheckpointSource(model_path).find_difference(arena)
        except ValueError as error:
            logger.info(
                "rank %d: neither names nor files tell whether the seed %s has the same model (%s): its shapes fit",
                rank,
                self.seed,
                error,
            )
            return
        if different:
            cause = (
                f"it has other weights than the files in {model_path}: {different} differs (give both instances the "
                "same --served-model-name if that is meant)"
            )
            raise WeightTransferError("agree", rank, self.seed, cause)

    def _map(self, arena: WeightArena) -> LoadReport | None:
        """Show the memory of a seed on this host in the arena. None where that is not possible, or not wanted."""
        mode = self._config.local_mode
        if mode not in ("auto", "map"):
            return None
        ranks = [rank for seed in self._seeds for rank in seed.ranks if rank.is_local]
        for rank in ranks:
            source = open_local(rank, arena, self._config)
            if source is None:
                continue
            with source:
                if not source.can_map():
                    continue
                try:
                    num_bytes = source.map()
                except (OSError, ValueError) as error:
                    logger.warning("rank %d: the memory of the seed %s can't be mapped: %s",
                                   arena.manifest.parallel.world_rank, rank.seed, error)  # fmt: skip
                    continue
            # The memory is the seed's own: samples tell whether it is what was announced.
            assert rank.answer.manifest is not None
            unknown = verify_by_entries(arena, [rank.answer.manifest], rank.seed, samples_only=True)
            return LoadReport(
                source="local_map",
                num_bytes=num_bytes,
                seconds=0.0,
                verified=not unknown,
                taken_from=(self._worker_ids.get(rank.answer.rank, rank.seed),),
                taken_bytes=(num_bytes,),
            )
        if mode == "map" and ranks:
            logger.warning("rank %d: no memory of the seed %s is laid out as the own one: copying",
                           arena.manifest.parallel.world_rank, self.seed)  # fmt: skip
        return None

    def _transfer(self, arena: WeightArena) -> LoadReport:
        transfer = SeedTransfer(arena, self._seeds, lambda: SeedSources(arena, self._config))
        try:
            while True:
                transfer.run()
                try:
                    verified = self._verify(arena, transfer)
                    break
                except ChecksumMismatch as error:
                    transfer.blame([(e.offset, e.offset + e.nbytes) for e in error.entries], error)
        except WeightTransferError:
            self._broken_off, self._given = transfer, transfer.given_nbytes(self._worker_ids)
            raise
        given = transfer.given_nbytes(self._worker_ids)
        return LoadReport(
            source="+".join(transfer.source_names),
            num_bytes=transfer.planned_nbytes,
            seconds=0.0,
            verified=verified,
            transfer_seconds=transfer.transfer_seconds,
            taken_from=tuple(given),
            taken_bytes=tuple(given.values()),
        )

    def _verify(self, arena: WeightArena, transfer: SeedTransfer) -> bool:
        """Whether every tensor could be compared with what the seeds say.

        Raises:
            ChecksumMismatch: if one differs.
            WeightTransferError: if none of the seeds can be asked any more.
        """
        unknown = verify_by_entries(arena, self._manifests(), self.seed)
        seeds = [seed for seed in transfer.alive if all(rank.answer.manifest is not None for rank in seed.ranks)]
        if not unknown or (seeds and verify_by_regions(arena, unknown, seeds, self._config)):
            return True
        logger.warning(
            "rank %d: the seed %s has checksums for %d of %d tensors; the others could not be compared",
            arena.manifest.parallel.world_rank,
            self.seed,
            len(arena.manifest.entries) - len(unknown),
            len(arena.manifest.entries),
        )
        return False
