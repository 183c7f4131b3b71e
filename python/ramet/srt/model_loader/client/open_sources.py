"""Owns the choice of the way to each rank of a seed: its memory where it is on this host, a network where it is not."""

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING

from ramet.srt.configs.load_config import LoadConfig
from ramet.srt.model_loader.arena.base import WeightArena
from ramet.srt.model_loader.client.local import open_local
from ramet.srt.model_loader.client.seed_instance import SeedRank
from ramet.srt.model_loader.client.transfer import RankSource
from ramet.srt.model_loader.client.transfer_engine import TransferEngineSource
from ramet.srt.model_loader.transport.receivers import Receivers

if TYPE_CHECKING:
    from ramet.srt.model_loader.client.collective import CollectiveSource, UpstreamCollectiveSource

logger = logging.getLogger(__name__)


class SeedSources:
    """The sources of one round of a transfer."""

    def __init__(self, arena: WeightArena, config: LoadConfig) -> None:
        self._arena = arena
        self._config = config
        self._files = ExitStack()
        self._remote: list[TransferEngineSource | CollectiveSource | UpstreamCollectiveSource] = []
        self._receivers = Receivers(config.host, arena.manifest.parallel.world_rank)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="populate")
        self._populating: Future[None] | None = None

    def open(self, rank: SeedRank) -> RankSource:
        """Raises WeightTransferError if a transport does not start, or can't pair this rank."""
        local = open_local(rank, self._arena, self._config, for_copy=True)
        if local is not None:
            return self._files.enter_context(local)
        source: TransferEngineSource | CollectiveSource | UpstreamCollectiveSource
        if self._config.backend == "nccl":
            source = self._open_collective(rank)
        else:
            source = self._open_engine(rank)
            if self._populating is None:
                # It is three times slower when it touches fresh memory page by page; gloo only loses a core.
                self._populating = self._pool.submit(self._arena.populate)
        self._remote.append(source)
        return source

    def _open_engine(self, rank: SeedRank) -> TransferEngineSource:
        engine = self._receivers.get(rank.answer.session_id)
        return TransferEngineSource(rank.answer, self._arena, engine, self._config.timeout_s)

    def _open_collective(self, rank: SeedRank) -> "CollectiveSource | UpstreamCollectiveSource":
        from ramet.srt.model_loader.client.collective import open_collective  # needs torch.distributed

        return open_collective(rank, self._arena, self._config)

    def close(self) -> None:
        """After every step has ended well. Raises MemoryError if there was not enough for the arena."""
        self._files.close()
        try:
            for source in self._remote:
                source.close()
        finally:
            self._receivers.close()
        self._pool.shutdown()
        if self._populating is not None:
            self._populating.result()

    def abandon(self) -> bool:
        """After a step has failed. True: nothing can overwrite what the arena holds, because who received has ended."""
        self._files.close()
        for source in self._remote:
            source.cut_off()
        self._pool.shutdown()
        self._receivers.close()
        return True
