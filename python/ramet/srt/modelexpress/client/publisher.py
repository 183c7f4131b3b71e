"""Owns one record at the metadata server for as long as its rank lives: published, kept alive, withdrawn."""

import logging
import random
import threading
import uuid
from collections.abc import Callable

import msgspec

from ramet.srt.modelexpress.ages import wall_clock_ms
from ramet.srt.modelexpress.client.client import ModelExpressClient, ModelExpressError
from ramet.srt.modelexpress.proto import p2p_pb2
from ramet.srt.modelexpress.settings import HEARTBEAT_INTERVAL_S, INTERVAL_VARIABLE, env_seconds
from ramet.srt.weights.report import PublisherStats, StandsStill

logger = logging.getLogger(__name__)

INITIALIZING = p2p_pb2.SOURCE_STATUS_INITIALIZING
READY = p2p_pb2.SOURCE_STATUS_READY
STALE = p2p_pb2.SOURCE_STATUS_STALE

INITIALIZING_INTERVAL_S = 5.0  # clients wait for an initializing source; they must notice soon that it has died
FIRST_BACKOFF_S = 0.5
MAX_BACKOFF_S = 5.0  # a server that comes back with no records must soon have them again
STILL_PAUSE_S = 1.0  # until a standing instance is looked at again
LOST_AFTER_REJECTIONS = 2  # heartbeats refused in a row: then the server has lost the record


class Publisher:
    """Keeps a worker's record at the server as it should be, from a thread of its own.

    A server that is away or refuses costs nothing but a retry: it is logged once, counted, and tried again with
    backoff until it works. So the rank that is published never waits for the server, unless it asks to. A connection
    that is lost is such a failure too, for the server may come back without its records long before the next heartbeat.

    Args:
        client: closed with the publisher.
        identity: what the worker serves.
        worker: its record; status and time are set here.
        load_probe: how busy the worker is, from 0 to 1, or None when that is not known. Raises StandsStill where its
            instance does not move: a READY record is not renewed then, and whoever looks at it sees that it gets old.
        heartbeat_interval_s: None takes MX_HEARTBEAT_INTERVAL_SECS, else 30.
    """

    def __init__(
        self,
        client: ModelExpressClient,
        identity: p2p_pb2.SourceIdentity,
        worker: p2p_pb2.WorkerMetadata,
        *,
        load_probe: Callable[[], float | None] = lambda: None,
        heartbeat_interval_s: float | None = None,
    ):
        self.worker_id = uuid.uuid4().hex
        self.identity = identity
        self._client = client
        self._worker = worker
        self._load_probe = load_probe
        self._interval_s = heartbeat_interval_s or env_seconds(INTERVAL_VARIABLE, HEARTBEAT_INTERVAL_S)
        self._changed = threading.Condition()
        self._wanted: int = INITIALIZING
        self._told: int | None = None  # the status that the server has acknowledged
        self._source_id = ""  # "" while the record must be published
        self._published: p2p_pb2.WorkerMetadata | None = None  # the last record that was
        self._num_changes = 0  # of what is wanted; wakes the thread
        self._closing = False
        self._rejections = 0
        self._backoff_s = 0.0
        self._stats = PublisherStats(status="")
        self._thread = threading.Thread(target=self._run, name=f"publisher-{self.worker_id[:8]}", daemon=True)

    def start(self) -> None:
        """Publish the record as INITIALIZING."""
        self._thread.start()
        if self._interval_s > MAX_BACKOFF_S:  # those that come more often notice by themselves
            self._client.watch_connection(self._note_connection_loss)

    def set_status(self, status: int, timeout_s: float = 0.0) -> bool:
        """Have the server told that the record is INITIALIZING, READY or STALE.

        Args:
            timeout_s: how long to wait for its acknowledgement; the publisher goes on trying afterwards.

        Returns:
            Whether the server has acknowledged it.
        """
        with self._changed:
            self._wanted = status
            self._note_change()
            return self._changed.wait_for(lambda: self._told == status, timeout_s)

    def publish_anew(self, worker: p2p_pb2.WorkerMetadata) -> None:
        """Put another record, of the same rank, in the place of the one that the server has, in the same state."""
        with self._changed:
            self._worker = worker
            self._note_change()

    def stats(self) -> PublisherStats:
        """A copy of the counters."""
        with self._changed:
            name = "" if self._told is None else p2p_pb2.SourceStatus.Name(self._told).removeprefix("SOURCE_STATUS_")
            return msgspec.structs.replace(self._stats, status=name)

    def close(self, timeout_s: float = 3.0) -> None:
        """Tell the server that the record is STALE, if that can be done in time, and end the thread. Idempotent."""
        self._client.unwatch_connection()
        with self._changed:
            self._closing = True
            self._note_change()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        self._client.close()  # a call that still runs fails, and the thread ends
        if self._thread.is_alive():
            self._thread.join(1.0)

    def _note_connection_loss(self) -> None:
        """Look at once whether the server still has the record; called in a thread of grpc's."""
        with self._changed:
            self._note_change()

    def _note_change(self) -> None:
        self._num_changes += 1
        self._changed.notify_all()

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._step()
            self._say_goodbye()
        except Exception:
            logger.exception("the publisher of worker %s has ended; other instances no longer find it", self.worker_id)

    def _wait_for_work(self) -> bool:
        """Wait until something must be sent: a change, a heartbeat, a retry. False when the thread is to end."""
        with self._changed:
            num_changes = self._num_changes
            self._changed.wait_for(lambda: self._closing or self._num_changes != num_changes, self._pause_s())
            return not self._closing

    def _pause_s(self) -> float | None:
        """How long nothing has to be sent if nothing changes; None: for ever."""
        if self._wanted == STALE and (self._told == STALE or not self._source_id):
            return None  # withdrawn, or never published
        if self._backoff_s:
            return self._backoff_s * random.uniform(0.75, 1.25)
        if self._told != self._wanted or self._published is not self._worker:
            return 0.0
        return min(self._interval_s, INITIALIZING_INTERVAL_S) if self._told == INITIALIZING else self._interval_s

    def _step(self) -> None:
        """Send what must be sent."""
        with self._changed:
            wanted, source_id = self._wanted, self._source_id
            if wanted == STALE and not source_id:
                return
            is_current = wanted == STALE or self._published is self._worker
        try:
            if not (source_id and is_current):
                source_id = self._publish(wanted)
            load = self._load_probe() if wanted == READY else None
            rank = self._worker.worker_rank
            accepted = self._client.update_status(source_id, self.worker_id, rank, wanted, load)
            if not accepted and wanted == STALE:
                accepted = self._is_unknown(source_id)
        except StandsStill:
            self._backoff_s = STILL_PAUSE_S
            return
        except ModelExpressError as error:
            self._note_failure(str(error))
            return
        with self._changed:
            if accepted:
                self._note_success(wanted)
            else:
                self._note_rejection(wanted)

    def _is_unknown(self, source_id: str) -> bool:
        """Whether the server has no record; it also refuses updates while its store is away, and then echoes no ids."""
        answer = self._client.get_metadata(source_id, self.worker_id)
        return not answer.found and answer.worker_id == self.worker_id

    def _say_goodbye(self) -> None:
        if not self._source_id or self._told == STALE:
            return
        try:
            self._client.update_status(self._source_id, self.worker_id, self._worker.worker_rank, STALE)
        except ModelExpressError as error:
            logger.warning("other instances may look for this one for a while: %s", error)

    def _publish(self, status: int) -> str:
        with self._changed:
            worker = self._worker
        record = p2p_pb2.WorkerMetadata()
        record.CopyFrom(worker)
        record.MergeFrom(p2p_pb2.WorkerMetadata(status=status, updated_at=wall_clock_ms()))
        source_id = self._client.publish(self.identity, self.worker_id, record)
        with self._changed:
            self._stats.num_publishes += 1
            self._source_id, self._published = source_id, worker
        logger.info(
            "published rank %d of %s as worker %s of source %s at the ModelExpress server %s",
            self._worker.worker_rank,
            self.identity.model_name,
            self.worker_id,
            source_id,
            self._client.address,
        )
        return source_id

    def _note_success(self, status: int) -> None:
        if self._stats.last_error:
            logger.info("the ModelExpress server %s answers again", self._client.address)
        self._told = status
        self._rejections, self._backoff_s = 0, 0.0
        self._stats.num_heartbeats += 1
        self._stats.last_error = ""
        self._changed.notify_all()

    def _note_rejection(self, status: int) -> None:
        self._rejections += 1
        self._backoff_s = min(2 * self._backoff_s or FIRST_BACKOFF_S, MAX_BACKOFF_S)
        if self._rejections >= LOST_AFTER_REJECTIONS and status != STALE:
            self._source_id, self._told = "", None
            self._rejections, self._backoff_s = 0, 0.0
            self._stats.num_lost += 1
            logger.warning(
                "the ModelExpress server %s has lost worker %s; publishing it again",
                self._client.address,
                self.worker_id,
            )

    def _note_failure(self, message: str) -> None:
        with self._changed:
            first = not self._stats.last_error
            self._stats.num_failures += 1
            self._stats.last_error = message
            self._backoff_s = min(2 * self._backoff_s or FIRST_BACKOFF_S, MAX_BACKOFF_S)
        logger.log(logging.WARNING if first else logging.DEBUG, "%s; trying again until it works", message)
