"""Owns what the metadata server is told about one rank of this engine, from its last byte of weights to its end."""

import logging
import threading
import time
from collections.abc import Callable
from urllib.parse import urlsplit

import msgspec

from ramet.srt.configs.load_config import LoadConfig
from ramet.srt.modelexpress.client.client import ModelExpressClient
from ramet.srt.modelexpress.client.publisher import READY, STALE, Publisher
from ramet.srt.modelexpress.client.seed_info import InfoAddress, make_info_url
from ramet.srt.modelexpress.proto import p2p_pb2
from ramet.srt.modelexpress.records import FACTS_KEY, InstanceFacts, build_worker_metadata, encode_facts
from ramet.srt.modelexpress.settings import heartbeat_interval_s
from ramet.srt.modelexpress.source_identity import make_source_identity
from ramet.srt.weights.manifest import WeightManifest
from ramet.srt.weights.registration import SeedRegistration
from ramet.srt.weights.report import Claim, PublisherStats

logger = logging.getLogger(__name__)

STALE_TIMEOUT_S = 2.0  # for the server to acknowledge that the instance is about to end
ACK_PERIOD_S = 1.0


class Publication:
    """One rank's record. Nothing here waits for the server, but `withdraw` for a moment."""

    def __init__(
        self,
        config: LoadConfig,
        registration: SeedRegistration,
        facts: InstanceFacts,
        *,
        accelerator: str,
        device_id: int,
        load_probe: Callable[[], float | None],
        claim: Claim | None,
    ):
        """Publish the record as INITIALIZING.

        Args:
            registration: what the rank offers.
            claim: released once the record is READY, so that whoever waits for the claim finds a source.

        Raises:
            ValueError: if a certificate, a token file or an environment variable can't be used.
        """
        manifest = registration.manifest
        assert manifest is not None and registration.arena_address is not None
        self._claim = claim
        self._ended = threading.Event()
        # One rank of each replica of a target model beats often: the fleet page shows its load and its silence.
        interval_s = heartbeat_interval_s(manifest.parallel.shard_rank == 0 and manifest.role == "target")
        self._facts = msgspec.structs.replace(facts, heartbeat_s=interval_s)
        self._worker = build_worker_metadata(
            manifest,
            base_address=registration.arena_address,
            session_id=registration.transfer_engine_info.session_id,
            info_url=self._info_url(facts.instance, manifest),
            facts=self._facts,
            accelerator=accelerator,
            device_id=device_id,
        )
        self._publisher = Publisher(
            ModelExpressClient(config.modelexpress_url),
            make_source_identity(config, manifest, is_trainer=registration.published is not None),
            self._worker,
            load_probe=load_probe,
            heartbeat_interval_s=interval_s,
        )
        self._publisher.start()

    @property
    def worker_id(self) -> str:
        return self._publisher.worker_id

    def stats(self) -> PublisherStats:
        return self._publisher.stats()

    def set_ready(self, timeout_s: float = 0.0) -> bool:
        """The instance is healthy.

        Args:
            timeout_s: how long to wait for the server to know it.

        Returns:
            Whether it knows it.
        """
        if self._ended.is_set():
            return False
        is_known = self._publisher.set_status(READY, timeout_s)
        if self._claim is not None:
            threading.Thread(target=self._hand_over, args=(self._claim,), name="release-claim", daemon=True).start()
        return is_known

    def rename(self, version: str) -> None:
        """The same weights go by another version's name from now on."""
        self._facts = msgspec.structs.replace(self._facts, weight_version=version)
        worker = p2p_pb2.WorkerMetadata()
        worker.CopyFrom(self._worker)
        worker.topology[FACTS_KEY] = encode_facts(self._facts)
        self._worker = worker
        self._publisher.publish_anew(worker)

    def withdraw(self) -> None:
        """The instance is about to end, or its weights to change: nobody shall come any more."""
        self._ended.set()
        if not self._publisher.set_status(STALE, STALE_TIMEOUT_S):
            logger.warning("the ModelExpress server has not yet heard that this instance ends")

    def close(self) -> None:
        """Tell the server, if that can be done in time, and end. Idempotent."""
        self._ended.set()
        if self._claim is not None:
            self._claim.release()
        self._publisher.close(STALE_TIMEOUT_S)

    def _hand_over(self, claim: Claim) -> None:
        """Give the claim back once there is a source in its place."""
        while not self._ended.is_set():
            start = time.monotonic()
            if self._publisher.set_status(READY, ACK_PERIOD_S):
                break
            self._ended.wait(max(0.0, ACK_PERIOD_S - (time.monotonic() - start)))
        claim.release()

    @staticmethod
    def _info_url(instance_url: str, manifest: WeightManifest) -> str:
        parts = urlsplit(instance_url)
        if not parts.hostname or parts.port is None:
            return ""
        rank = manifest.parallel.world_rank
        return make_info_url(InfoAddress(parts.hostname, parts.port, rank, manifest.role, parts.scheme))
