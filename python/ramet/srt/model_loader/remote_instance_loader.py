"""Owns taking a rank's weights from a running instance: which way, what is checked, and what follows a failure."""

import logging
import time

import msgspec

from ramet.srt.configs.load_config import LoadConfig
from ramet.srt.managers.io_struct import LoadReport
from ramet.srt.model_loader.checkpoint_loader import DefaultModelLoader, log_report
from ramet.srt.model_loader.errors import WeightTransferError, name_some
from ramet.srt.model_loader.remote_instance_weight_loader_utils import (
    fetch_seed_answer,
    find_disagreement,
    format_address,
    host_identity,
    is_folder_name,
    reachable_host,
)
from ramet.srt.model_loader.seed_registration import SeedAnswer
from ramet.srt.model_loader.sources.checkpoint import CheckpointSource
from ramet.srt.model_loader.sources.local import LocalSource
from ramet.srt.model_loader.sources.transfer_engine import TransferEngineSource
from ramet.srt.model_loader.transfer_plan import PlanError
from ramet.srt.model_loader.weight_arena import WeightArena
from ramet.srt.model_loader.weight_checksums import expected_checksums, find_mismatches
from ramet.srt.model_loader.weight_manifest import WeightChecksums, WeightManifest

logger = logging.getLogger(__name__)

LOCAL_TIMEOUT_S = 5.0  # for the seed to hand its memory over; the network is tried after it


class RemoteInstanceModelLoader:
    """Takes weights from the same rank of a seed instance; from disk when that fails, unless told not to."""

    def __init__(self, config: LoadConfig) -> None:
        if config.seed_instance_ip is None or config.seed_instance_service_port is None:
            raise ValueError("loading from a remote instance needs the seed's address and port")
        self._config = config
        self._host, self._port = config.seed_instance_ip, config.seed_instance_service_port
        self.seed = format_address(self._host, self._port)
        self._broken_off: TransferEngineSource | None = None  # a transfer that has filled a part of the arena
        self._start = 0.0

    def load_weights(self, manifest: WeightManifest, arena: WeightArena, model_path: str) -> LoadReport:
        """Fill the arena in place; see ModelLoader."""
        self._broken_off = None
        self._start = time.perf_counter()
        try:
            report = self._load_from_seed(manifest, arena, model_path)
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

    def _load_from_disk(
        self, manifest: WeightManifest, arena: WeightArena, model_path: str, reason: WeightTransferError
    ) -> LoadReport:
        try:
            report = self._finish_from_disk(manifest, arena, model_path)
            if report is None:
                report = DefaultModelLoader().load_weights(manifest, arena, model_path)
        except ValueError as error:
            raise ValueError(f"no weights from the seed ({reason}), and none from disk ({error})") from error
        return msgspec.structs.replace(report, fallback_reason=str(reason))

    def _finish_from_disk(self, manifest: WeightManifest, arena: WeightArena, model_path: str) -> LoadReport | None:
        """Read only what the seed has not sent. None if it sent nothing that can be used, or has other weights."""
        broken_off = self._broken_off
        if broken_off is None or len(broken_off.unfinished) == len(broken_off.plan.ops):
            return None
        disk = CheckpointSource(model_path)
        rest = disk.plan(manifest, broken_off.unfinished)
        disk.fill(rest, arena)
        try:
            verified = broken_off.seed_manifest and self._verify(
                manifest, arena, broken_off.seed_manifest, samples_only=False
            )
        except WeightTransferError as error:
            logger.info("rank %d: the files are not what the seed has: reading all of them (%s)",
                        manifest.parallel.world_rank, error)  # fmt: skip
            return None
        if not verified:
            return None
        received = broken_off.plan.nbytes - sum(op.nbytes for op in broken_off.unfinished)
        report = LoadReport(
            source=f"{broken_off.name}+{disk.name}",
            num_bytes=received + rest.nbytes,
            seconds=time.perf_counter() - self._start,
            verified=True,
        )
        log_report(manifest, report)
        return report

    def _load_from_seed(self, manifest: WeightManifest, arena: WeightArena, model_path: str) -> LoadReport:
        rank = manifest.parallel.world_rank
        config = self._config
        answer = fetch_seed_answer(
            self._host, self._port, rank, manifest.role, config.timeout_s, api_key=config.api_key
        )
        if answer.manifest is not None:
            disagreement = find_disagreement(manifest, answer.manifest)
            if disagreement:
                raise WeightTransferError("agree", rank, self.seed, disagreement)
        start = time.perf_counter()
        try:
            report = self._load_locally(manifest, arena, answer) or self._transfer(manifest, arena, answer)
        except PlanError as error:
            raise WeightTransferError("agree", rank, self.seed, error) from error
        if answer.manifest is None or (
            answer.manifest.model_name != manifest.model_name and is_folder_name(manifest, answer.manifest)
        ):
            self._compare_with_files(manifest, arena, model_path)
        return msgspec.structs.replace(report, seconds=time.perf_counter() - start)

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

    def _load_locally(self, manifest: WeightManifest, arena: WeightArena, answer: SeedAnswer) -> LoadReport | None:
        """By mapping or copying the seed's memory; None where that is not possible and the network must do."""
        mode, handle = self._config.local_mode, answer.local_handle
        if mode == "off" or handle is None or answer.manifest is None:
            return None
        rank = manifest.parallel.world_rank
        if handle.host_identity != host_identity():
            logger.info("rank %d: the seed %s is on another host", rank, self.seed)
            return None
        try:
            with LocalSource(answer.manifest, handle, min(self._config.timeout_s, LOCAL_TIMEOUT_S)) as source:
                is_mapped = mode != "copy" and source.can_map(arena)
                if mode == "map" and not is_mapped:
                    logger.warning(
                        "rank %d: the memory of the seed %s is laid out differently: copying", rank, self.seed
                    )
                num_bytes = source.map(arena) if is_mapped else source.copy(arena)
        except PlanError:
            raise
        except (OSError, ValueError) as error:
            logger.warning(
                "rank %d: the seed %s is on this host, but its memory can't be had (%s); using the network",
                rank,
                self.seed,
                error,
            )
            return None
        # Mapped memory is the seed's own: samples tell whether it is what was announced.
        verified = self._verify(manifest, arena, answer.manifest, samples_only=is_mapped)
        return LoadReport(
            source="local_map" if is_mapped else "local_copy",
            num_bytes=num_bytes,
            seconds=0.0,
            verified=verified,
            transfer_seconds=source.transfer_seconds,
        )

    def _transfer(self, manifest: WeightManifest, arena: WeightArena, answer: SeedAnswer) -> LoadReport:
        source = TransferEngineSource(answer, manifest)
        try:
            source.fill(arena, reachable_host(self._config.host), self._config.timeout_s)
        except WeightTransferError:
            self._broken_off = source
            raise
        verified = answer.manifest is not None and self._verify(manifest, arena, answer.manifest, samples_only=False)
        return LoadReport(source=source.name, num_bytes=source.plan.nbytes, seconds=0.0, verified=verified)

    def _verify(
        self, manifest: WeightManifest, arena: WeightArena, seed_manifest: WeightManifest, *, samples_only: bool
    ) -> bool:
        """Whether every tensor could be compared with the seed's checksums.

        Raises:
            WeightTransferError: if one differs.
        """
        rank = manifest.parallel.world_rank
        expected = expected_checksums(arena, seed_manifest, samples_only=samples_only)
        mismatches = find_mismatches(manifest, arena, expected, samples_only=samples_only)
        if mismatches:
            cause = f"the checksums of {len(mismatches)} tensors differ from the seed's: {name_some(mismatches)}"
            raise WeightTransferError("verify", rank, self.seed, cause)
        if len(expected) < len(manifest.entries):
            logger.warning(
                "rank %d: the seed %s has checksums for %d of %d tensors; the others could not be compared",
                rank,
                self.seed,
                len(expected),
                len(manifest.entries),
            )
            return False
        values = expected_checksums(arena, seed_manifest)
        samples = expected_checksums(arena, seed_manifest, samples_only=True)
        arena.checksums = WeightChecksums(
            algorithm=arena.checksum_algorithm,
            values=tuple(values[entry.name] for entry in manifest.entries),
            samples=tuple(samples[entry.name] for entry in manifest.entries),
        )
        return True
