"""Owns one attempt to fill an arena from seeds that share the work: which way, what is checked, what is left of it."""

import dataclasses
import logging
import time

import msgspec

from ramet.srt.configs.load_config import LoadConfig
from ramet.srt.model_loader.arena.base import WeightArena
from ramet.srt.model_loader.checkpoint.checkpoint_loader import OpenCheckpoint
from ramet.srt.model_loader.checkpoint.source import CheckpointSource
from ramet.srt.model_loader.client.digest_check import DigestCheck
from ramet.srt.model_loader.client.fan_out import DoorOpener, FanOut, can_fan_out
from ramet.srt.model_loader.client.local import open_local
from ramet.srt.model_loader.client.open_sources import SeedSources
from ramet.srt.model_loader.client.seed_finder import FoundSeeds
from ramet.srt.model_loader.client.transfer import SeedTransfer
from ramet.srt.model_loader.client.verification import (
    ChecksumMismatch,
    OtherWeights,
    verify_by_entries,
    verify_by_regions,
)
from ramet.srt.model_loader.client.version_check import VersionSwitched, agreed_version, check_versions
from ramet.srt.weights.agreement import is_folder_name
from ramet.srt.weights.errors import WeightTransferError, name_some
from ramet.srt.weights.manifest import WeightManifest
from ramet.srt.weights.report import LoadReport

logger = logging.getLogger(__name__)

LOCAL_MAP = "local_map"  # whose samples alone are compared


class Attempt:
    """One attempt. Where its transfer breaks off, it knows what has been given, so that files only fill the rest."""

    def __init__(
        self,
        seeds: FoundSeeds,
        arena: WeightArena,
        config: LoadConfig,
        digest: DigestCheck,
        open_checkpoint: OpenCheckpoint = CheckpointSource,
        open_doors: DoorOpener | None = None,
    ) -> None:
        """
        Args:
            open_doors: lets others take what has come before all has; None: nothing is given on.
        """
        self._open_checkpoint = open_checkpoint
        self._open_doors = open_doors
        self._seeds = seeds
        self._digest = digest
        self._arena = arena
        self._config = config
        self._manifest = arena.manifest
        self._rank = arena.manifest.parallel.world_rank
        self._broken_off: SeedTransfer | None = None  # what it has filled can be kept
        self._version = ""  # of the seeds' weights, once it is agreed on

    def run(self, model_path: str) -> LoadReport:
        """Fill the arena in place, and check it.

        Args:
            model_path: own files, if there are any, tell models of equal shapes apart where names can't.

        Raises:
            VersionSwitched: if the weights of a seed have changed meanwhile.
            WeightTransferError: if the seeds could not give the weights, or have others.
            MemoryError: if the weights don't fit into memory.
        """
        try:
            return self._run(model_path)
        except BaseException:
            self._arena.close_doors()
            raise

    def _run(self, model_path: str) -> LoadReport:
        start = time.perf_counter()
        self._arena.checksums = self._arena.content_digest = None  # of what another attempt has left
        fitting = self._digest.prepare(self._seeds.instances, self._manifest)
        self._seeds = dataclasses.replace(self._seeds, instances=fitting)
        self._version = agreed_version(fitting, self._rank)
        report = self._take()
        table = self._arena.content_digest
        is_doubtful = self._config.modelexpress_url is not None or self._may_be_another_model()
        if table is None and is_doubtful and not self._config.is_update:
            self._compare_with_files(model_path)
        digest = table.digest if table is not None else ""
        seconds = time.perf_counter() - start
        instances = tuple(seed.server.address.url for seed in fitting if seed.server.address.host)
        return msgspec.structs.replace(
            report, seconds=seconds, digest=digest, weight_version=self._version, instances=instances
        )

    def _take(self) -> LoadReport:
        """Fill the arena, and see to it that all is of the version that was agreed on.

        Checksums prove that. Where they don't, or something fails, the seeds are asked which version they have now.
        """
        try:
            report = self._map() or self._transfer()
        except WeightTransferError as error:
            try:
                check_versions(self._seeds.instances, self._version, self._rank)
            except VersionSwitched as switched:
                self._broken_off = None  # the seeds have nothing more of that version
                raise switched from error
            raise
        if report.source == LOCAL_MAP or not report.verified:
            check_versions(self._seeds.instances, self._version, self._rank)
        return report

    def finish_from_disk(self, model_path: str) -> LoadReport | None:
        """Read only what the seeds have not sent before their transfer broke off.

        Returns:
            The report, without its seconds; None if they sent nothing that can be used, or have other weights.

        Raises:
            ValueError: if the files can't be used.
        """
        broken_off = self._broken_off
        if broken_off is None or not broken_off.received_nbytes:
            return None
        self._digest.use_files(model_path)
        disk = self._open_checkpoint(model_path)
        rest = disk.plan(self._manifest, broken_off.unfinished)
        disk.fill(rest, self._arena)
        try:
            unknown = verify_by_entries(self._arena, self._seed_manifests(), self._seeds.name)
            is_compared = self._digest.compare(self._arena, self._seeds.name)
        except WeightTransferError as error:
            logger.info("rank %d: the files are not what the seed has: reading all of them (%s)", self._rank, error)
            return None
        if unknown or not is_compared and disk.find_difference(self._arena) is not None:
            return None
        given = broken_off.given_nbytes(self._seeds.worker_ids)
        return LoadReport(
            source="+".join([*broken_off.source_names, disk.name]),
            num_bytes=broken_off.received_nbytes + rest.nbytes,
            seconds=0.0,
            verified=True,
            taken_from=tuple(given),
            taken_bytes=tuple(given.values()),
            digest=self._digest.digest if is_compared else "",
            weight_version=self._version,
        )

    def _map(self) -> LoadReport | None:
        """Show the memory of a seed on this host in the arena. None where that is not possible, or not wanted."""
        mode = self._config.local_mode
        if mode not in ("auto", "map"):
            return None
        if self._digest.is_required:
            return None  # whoever has made the memory could still change it after the comparison: it is copied
        ranks = [rank for seed in self._seeds.instances for rank in seed.ranks if rank.is_local]
        for rank in ranks:
            source = open_local(rank, self._arena, self._config)
            if source is None:
                continue
            with source:
                if not source.can_map():
                    continue
                try:
                    num_bytes = source.map()
                except (OSError, ValueError) as error:
                    logger.warning("rank %d: the memory of the seed %s can't be mapped: %s",
                                   self._rank, rank.seed, error)  # fmt: skip
                    continue
            # The memory is the seed's own: samples tell whether it is what was announced.
            assert rank.answer.manifest is not None
            unknown = verify_by_entries(self._arena, [rank.answer.manifest], rank.seed, samples_only=True)
            self._digest.compare(self._arena, rank.seed)
            return LoadReport(
                source=LOCAL_MAP,
                num_bytes=num_bytes,
                seconds=0.0,
                verified=not unknown,
                taken_from=(self._seeds.worker_ids.get(rank.answer.rank, rank.seed),),
                taken_bytes=(num_bytes,),
            )
        if mode == "map" and ranks:
            logger.warning("rank %d: no memory of the seed %s is laid out as the own one: copying",
                           self._rank, self._seeds.name)  # fmt: skip
        return None

    def _transfer(self) -> LoadReport:
        arena, config = self._arena, self._config
        transfer = SeedTransfer(arena, self._seeds.instances, lambda: SeedSources(arena, config))
        is_checked = self._fan_out(transfer)
        try:
            while True:
                transfer.run()
                try:
                    verified = is_checked or self._verify(transfer)
                    self._digest.compare(arena, self._seeds.name)
                    break
                except ChecksumMismatch as error:
                    is_checked = False
                    self._arena.close_doors()
                    transfer.blame([(e.offset, e.offset + e.nbytes) for e in error.entries], error)
        except WeightTransferError:
            self._broken_off = transfer
            raise
        given = transfer.given_nbytes(self._seeds.worker_ids)
        return LoadReport(
            source="+".join(transfer.source_names),
            num_bytes=transfer.planned_nbytes,
            seconds=0.0,
            verified=verified,
            transfer_seconds=transfer.transfer_seconds,
            taken_from=tuple(given),
            taken_bytes=tuple(given.values()),
        )

    def _fan_out(self, transfer: SeedTransfer) -> bool:
        """Take what can be had piece by piece together with others; whether that is all, and was checked."""
        if self._open_doors is None or not can_fan_out(self._arena, self._seeds.instances, self._config):
            return False
        try:
            fan_out = FanOut(self._arena, self._seeds.instances, self._config, self._open_doors)
        except OSError as error:
            logger.warning("rank %d: nobody can reach this host, so nothing is given on: %s", self._rank, error)
            return False
        try:
            fan_out.run()
            transfer.start_with(
                fan_out.received, fan_out.missing, fan_out.errors, fan_out.source_names, fan_out.seconds
            )
            if fan_out.missing:
                fan_out.close()
                return False
        except BaseException:
            fan_out.close()
            raise
        fan_out.leave_doors()
        return True

    def _verify(self, transfer: SeedTransfer) -> bool:
        """Whether every tensor could be compared with what the seeds say.

        Raises:
            ChecksumMismatch: if one differs.
            WeightTransferError: if none of the seeds can be asked any more.
        """
        unknown = verify_by_entries(self._arena, self._seed_manifests(), self._seeds.name)
        seeds = [seed for seed in transfer.alive if all(rank.answer.manifest is not None for rank in seed.ranks)]
        if not unknown or (seeds and verify_by_regions(self._arena, unknown, seeds, self._config)):
            return True
        logger.warning(
            "rank %d: the seed %s has checksums for %d of %d tensors; the others could not be compared",
            self._rank,
            self._seeds.name,
            len(self._manifest.entries) - len(unknown),
            len(self._manifest.entries),
        )
        return False

    def _seed_manifests(self) -> list[WeightManifest]:
        answers = [rank.answer for seed in self._seeds.instances for rank in seed.ranks]
        return [answer.manifest for answer in answers if answer.manifest is not None]

    def _may_be_another_model(self) -> bool:
        """Whether the seeds' model has another name than the own one, or none, and still may be the same."""
        manifests = self._seed_manifests()
        if len(manifests) < sum(len(seed.ranks) for seed in self._seeds.instances):
            return True
        own = self._manifest
        return any(theirs.model_name != own.model_name and is_folder_name(own, theirs) for theirs in manifests)

    def _compare_with_files(self, model_path: str) -> None:
        """Where names can't tell one model from another of the same shape, own files can, if there are any.

        Raises:
            WeightTransferError: if the files hold other weights.
        """
        try:
            files = self._open_checkpoint(model_path)
            different = files.find_difference(self._arena)
        except ValueError as error:
            logger.info(
                "rank %d: no digest and no files tell whether the seed %s has the same weights (%s): its names and "
                "shapes fit",
                self._rank,
                self._seeds.name,
                error,
            )
            return
        if not different and (names := files.converted_names):
            logger.warning(
                "rank %d: %d tensors are converted while they are loaded, so nothing here tells whether those from %s "
                "are the right ones: %s",
                self._rank,
                len(names),
                self._seeds.name,
                name_some(names),
            )
        if different:
            cause = (
                f"it has other weights than the files in {model_path}: {different} differs (give both instances the "
                "same --served-model-name if that is meant)"
            )
            raise OtherWeights("agree", self._rank, self._seeds.name, cause)
