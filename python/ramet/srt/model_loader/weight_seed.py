"""Owns offering a loaded arena to others: its checksums, its transfer engine, its local socket, its registration."""

import logging
import time

from ramet.srt.model_loader.local_share import LocalShareServer
from ramet.srt.model_loader.mooncake_engine import MooncakeEngine
from ramet.srt.model_loader.remote_instance_weight_loader_utils import (
    host_identity,
    reachable_host,
    register_transfer_engine_info,
)
from ramet.srt.model_loader.seed_registration import LocalHandle, SeedRegistration, TransferEngineInfo
from ramet.srt.model_loader.weight_arena import WeightArena
from ramet.srt.model_loader.weight_checksums import compute_checksums, with_checksums
from ramet.srt.model_loader.weight_manifest import WeightManifest, element_size

logger = logging.getLogger(__name__)


class WeightSeed:
    """One rank's weights on offer. The arena is immutable from the start on."""

    def __init__(self, arena: WeightArena, registration: SeedRegistration, engine: MooncakeEngine,
                 share: LocalShareServer) -> None:  # fmt: skip
        self.registration = registration
        self._arena = arena  # its memory must stay for as long as it is offered
        self._engine = engine
        self._share = share

    @classmethod
    def start(cls, manifest: WeightManifest, arena: WeightArena, *, host: str) -> "WeightSeed":
        """Publish an arena whose content is final.

        Args:
            host: address that the instance is bound to.

        Raises:
            WeightTransferError: if Mooncake does not start.
            OSError: if the local socket can't be made.
        """
        start = time.perf_counter()
        checksums = arena.checksums or compute_checksums(manifest, arena)
        arena.checksums = checksums
        arena.publish()
        rank = manifest.parallel.world_rank
        engine = MooncakeEngine.acquire(reachable_host(host), rank)
        engine.register(arena.address, arena.nbytes)
        try:
            share = LocalShareServer(arena)
        except OSError:
            engine.unregister(arena.address)
            raise
        registration = SeedRegistration(
            rank=rank,
            role=manifest.role,
            transfer_engine_info=TransferEngineInfo(
                session_id=engine.session_id, weights_info_dict=weights_info(manifest, arena.address)
            ),
            manifest=with_checksums(manifest, checksums),
            arena_address=arena.address,
            local_handle=LocalHandle(host_identity=host_identity(), socket_name=share.name),
        )
        logger.info(
            "rank %d: offering %.3f GB of %s weights as %s (prepared in %.2f s)",
            rank,
            manifest.payload_nbytes / 1e9,
            manifest.role,
            engine.session_id,
            time.perf_counter() - start,
        )
        return cls(arena, registration, engine, share)

    def register(self, bootstrap_url: str, *, admin_api_key: str | None, timeout_s: float) -> None:
        """Tell the instance's bootstrap server, until it has understood.

        Raises:
            WeightTransferError: if it has not within `timeout_s`: a rank that nobody can find is no running rank.
        """
        register_transfer_engine_info(
            bootstrap_url, self.registration, admin_api_key=admin_api_key, timeout_s=timeout_s
        )

    def close(self) -> None:
        """Withdraw the offer. Processes that have mapped the memory keep it."""
        self._share.close()
        self._engine.unregister(self._arena.address)


def weights_info(manifest: WeightManifest, arena_address: int) -> dict[str, tuple[int, int, int]]:
    """Upstream's description of the tensors: name -> (address, number of elements, bytes of an element)."""
    info = {}
    for entry in manifest.entries:
        size = element_size(entry.dtype)
        info[entry.name] = (arena_address + entry.offset, entry.nbytes // size, size)
    return info
