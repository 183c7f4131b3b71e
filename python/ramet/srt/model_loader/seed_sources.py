"""Owns the choice of the way to each rank of a seed: its memory where it is on this host, a network where it is not."""

import logging
from contextlib import ExitStack

from ramet.srt.configs.load_config import LoadConfig
from ramet.srt.model_loader.remote_instance_weight_loader_utils import reachable_host
from ramet.srt.model_loader.seed_instance import SeedRank
from ramet.srt.model_loader.seed_transfer import RankSource
from ramet.srt.model_loader.sources.local import LocalSource
from ramet.srt.model_loader.sources.transfer_engine import EngineReceiver, TransferEngineSource
from ramet.srt.model_loader.weight_arena import WeightArena

logger = logging.getLogger(__name__)

LOCAL_TIMEOUT_S = 5.0  # for the seed to hand its memory over; the network is tried after it


class SeedSources:
    """The sources of one round of a transfer."""

    def __init__(self, arena: WeightArena, config: LoadConfig) -> None:
        self._arena = arena
        self._config = config
        self._files = ExitStack()
        self._receiver: EngineReceiver | None = None

    def open(self, rank: SeedRank) -> RankSource:
        """Raises WeightTransferError if the transfer engine does not start."""
        local = open_local(rank, self._arena, self._config)
        if local is not None:
            return self._files.enter_context(local)
        if self._receiver is None:
            self._receiver = EngineReceiver(self._arena, reachable_host(self._config.host))
        return TransferEngineSource(rank.answer, self._arena, self._receiver, self._config.timeout_s)

    def close(self) -> None:
        """After every read has ended well. Raises MemoryError if there was not enough for the arena."""
        self._files.close()
        if self._receiver is not None:
            self._receiver.close()

    def abandon(self) -> bool:
        """After a read has failed: False if it may still overwrite what the arena holds."""
        self._files.close()
        if self._receiver is None:
            return True
        self._receiver.abandon()
        return not self._receiver.writes_to_pages


def open_local(rank: SeedRank, arena: WeightArena, config: LoadConfig) -> LocalSource | None:
    """The rank's memory, if it is on this host and can be had."""
    if not rank.is_local:
        return None
    manifest, handle = rank.answer.manifest, rank.answer.local_handle
    assert manifest is not None and handle is not None
    try:
        return LocalSource(manifest, handle, arena, min(config.timeout_s, LOCAL_TIMEOUT_S), config.timeout_s)
    except (OSError, ValueError) as error:
        logger.warning(
            "rank %d: the seed %s is on this host, but its memory can't be had (%s); using the network",
            arena.manifest.parallel.world_rank,
            rank.seed,
            error,
        )
        return None
