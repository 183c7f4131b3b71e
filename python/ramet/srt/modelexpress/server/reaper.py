"""Owns when a record stops counting: marked STALE when its worker falls silent, removed when it stays that way."""

import asyncio
import contextlib
import logging
from collections import Counter

from ramet.srt.modelexpress.ages import wall_clock_ms
from ramet.srt.modelexpress.proto import p2p_pb2
from ramet.srt.modelexpress.server.row_ages import RowAges
from ramet.srt.modelexpress.server.server_metrics import ServerMetrics
from ramet.srt.modelexpress.server.store import MetadataStore, Row, StoreError

logger = logging.getLogger(__name__)

ACTIVE = (p2p_pb2.SOURCE_STATUS_READY, p2p_pb2.SOURCE_STATUS_INITIALIZING)


class Reaper:
    """Looks at all records again and again. Several servers may do so on one store: a record changes only if it is
    still what this reaper saw, so a heartbeat that comes in between wins.

    Args:
        heartbeat_timeout_s: an active record that is older becomes STALE.
        gc_timeout_s: a STALE record that is older is removed.
    """

    def __init__(
        self,
        store: MetadataStore,
        ages: RowAges,
        metrics: ServerMetrics,
        heartbeat_timeout_s: float,
        gc_timeout_s: float,
    ):
        self._store = store
        self._ages = ages
        self._metrics = metrics
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._gc_timeout_s = gc_timeout_s

    async def run(self, interval_s: float, stop: asyncio.Event) -> None:
        """Reap now and every `interval_s` until `stop` is set: redis may swallow a cancellation."""
        while not stop.is_set():
            try:
                await self.reap()
                self._metrics.store_up.set(1)
            except StoreError as error:
                self._metrics.store_up.set(0)
                logger.warning(
                    "the reaper could not read the records, and tries again in %.0f s: %s", interval_s, error
                )
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), interval_s)

    async def reap(self) -> tuple[int, int]:
        """One pass. Returns how many records were marked stale and how many were removed."""
        rows = [row for source in await self._store.sources() for row in source.rows]
        self._ages.keep_only(rows)
        num_stale = num_removed = 0
        for row in rows:
            age_s = self._ages.row_age_s(row)
            if row.status in ACTIVE and age_s > self._heartbeat_timeout_s:
                num_stale += await self._mark_stale(row)
            elif row.status == p2p_pb2.SOURCE_STATUS_STALE and age_s > self._gc_timeout_s:
                num_removed += await self._store.remove(row)
        self._count(Counter(row.status for row in rows), num_stale, num_removed)
        return num_stale, num_removed

    async def _mark_stale(self, row: Row) -> bool:
        now = wall_clock_ms()
        marked = await self._store.mark_stale(row, now)
        if marked:
            self._ages.age_s(row.source_id, row.worker_id, row.worker_rank, now)
        return marked

    def _count(self, statuses: Counter[int], num_stale: int, num_removed: int) -> None:
        for name, value in p2p_pb2.SourceStatus.items():
            self._metrics.workers.labels(name.removeprefix("SOURCE_STATUS_").lower()).set(statuses[value])
        self._metrics.reaped.labels("stale").inc(num_stale)
        self._metrics.reaped.labels("removed").inc(num_removed)
        if num_stale or num_removed:
            logger.info(
                "of %d records %d fell silent and %d were removed", sum(statuses.values()), num_stale, num_removed
            )
