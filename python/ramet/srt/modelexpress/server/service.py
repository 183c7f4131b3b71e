"""Owns the answers of P2pService: what is asked for, what is found, and that errors are flags in the answer."""

import logging
import math
import time
from collections.abc import Awaitable, Callable
from typing import Any

from ramet.srt.modelexpress.ages import wall_clock_ms
from ramet.srt.modelexpress.proto import p2p_pb2
from ramet.srt.modelexpress.records import read_facts, worker_tensors
from ramet.srt.modelexpress.rpc import MAX_MESSAGE_BYTES
from ramet.srt.modelexpress.server.load_history import LoadHistory
from ramet.srt.modelexpress.server.row_ages import RowAges
from ramet.srt.modelexpress.server.server_metrics import ServerMetrics
from ramet.srt.modelexpress.server.store import MetadataStore, Row, Source, StoreError, training_step
from ramet.srt.modelexpress.source_identity import CLAIM_PARAMETER, compute_source_id
from ramet.srt.observability.logs import escape_text

logger = logging.getLogger(__name__)

OK, INVALID, NOT_FOUND, STORE_ERROR = "ok", "invalid_argument", "not_found", "store_error"
LISTED_ROW = p2p_pb2.ListSourcesResponse.DESCRIPTOR.fields_by_name["instances"].number
ANSWERED_WORKER = p2p_pb2.GetMetadataResponse.DESCRIPTOR.fields_by_name["worker"].number
MAX_TEXT_LEN = 4096
MAX_MAP_LEN = 64 << 10  # of a map's keys and values together
KNOWN_STATUSES = frozenset(p2p_pb2.SourceStatus.values())


class P2pService:
    """The four calls. They answer gRPC OK always: published clients look at `success` and `found`, not at a status.

    Args:
        heartbeat_timeout_s: a READY row that is older is not listed as READY.
    """

    def __init__(
        self,
        store: MetadataStore,
        ages: RowAges,
        history: LoadHistory,
        metrics: ServerMetrics,
        heartbeat_timeout_s: float,
    ):
        self._store = store
        self._ages = ages
        self._history = history
        self._metrics = metrics
        self._heartbeat_timeout_s = heartbeat_timeout_s

    async def PublishMetadata(self, request: p2p_pb2.PublishMetadataRequest, _context: Any) -> Any:
        return await self._answer("PublishMetadata", self._publish, request)

    async def ListSources(self, request: p2p_pb2.ListSourcesRequest, _context: Any) -> Any:
        return await self._answer("ListSources", self._list, request)

    async def GetMetadata(self, request: p2p_pb2.GetMetadataRequest, _context: Any) -> Any:
        return await self._answer("GetMetadata", self._get, request)

    async def UpdateStatus(self, request: p2p_pb2.UpdateStatusRequest, _context: Any) -> Any:
        return await self._answer("UpdateStatus", self._update, request)

    async def _answer(self, method: str, handle: Callable[[Any], Awaitable[tuple[Any, str]]], request: Any) -> Any:
        start = time.perf_counter()
        response, outcome = await handle(request)
        self._metrics.observe_call(method, outcome, time.perf_counter() - start)
        return response

    async def _publish(self, request: p2p_pb2.PublishMetadataRequest) -> tuple[p2p_pb2.PublishMetadataResponse, str]:
        if reason := missing_in_publish(request):
            return p2p_pb2.PublishMetadataResponse(success=False, message=reason), INVALID
        worker, worker_id = request.worker, request.worker_id
        rank, num_tensors, updated_at = worker.worker_rank, len(worker_tensors(worker)), worker.updated_at
        facts = read_facts(worker.topology)
        try:
            source_id = await self._store.publish(request.identity, worker_id, worker)
        except StoreError as error:
            logger.error("PublishMetadata of worker %r rank %d failed: %s", worker_id, rank, error)
            message = f"Failed to publish metadata: {error}"
            return p2p_pb2.PublishMetadataResponse(success=False, message=message), STORE_ERROR
        self._ages.age_s(source_id, worker_id, rank, updated_at)
        if CLAIM_PARAMETER not in request.identity.extra_parameters:
            self._history.note(request.identity.model_name, worker_id, rank, facts)
        message = (
            f"published {num_tensors} tensors of rank {rank} of {request.identity.model_name!r} as source {source_id}, "
            f"worker {worker_id}"
        )
        logger.info("%s", escape_text(message, 2 * MAX_TEXT_LEN))
        answer = p2p_pb2.PublishMetadataResponse(
            success=True, message=message, mx_source_id=source_id, worker_id=worker_id
        )
        return answer, OK

    async def _list(self, request: p2p_pb2.ListSourcesRequest) -> tuple[p2p_pb2.ListSourcesResponse | bytes, str]:
        source_id = compute_source_id(request.identity) if request.identity.model_name else None
        try:
            sources = await self._store.sources(source_id)
        except StoreError as error:
            logger.error("ListSources failed: %s", error)
            return p2p_pb2.ListSourcesResponse(), STORE_ERROR
        found = [(row, source) for source in sources for row in self._wanted_rows(source, request)]
        found.sort(key=lambda pair: pair[0].updated_at, reverse=True)
        if request.limit:
            found = found[: request.limit]
        # A thousand rows are put together from their bytes, which a row keeps, in a tenth of the time.
        encoded = b"".join(encode_field(LISTED_ROW, row.encode_ref(source.identity)) for row, source in found)
        return encoded, OK

    def _wanted_rows(self, source: Source, request: p2p_pb2.ListSourcesRequest) -> list[Row]:
        """The rows of a source that a listing's filters let through."""
        if not source_wanted(source.identity, request):
            return []
        rows = source.rows
        if request.HasField("worker_rank_filter"):
            rank = request.worker_rank_filter
            rows = [row for row in rows if row.worker_rank == rank]
        if request.HasField("status_filter") and request.status_filter in KNOWN_STATUSES:
            status = request.status_filter
            rows = [row for row in rows if row.status == status]
            if status == p2p_pb2.SOURCE_STATUS_READY:
                rows = [row for row in rows if self.is_fresh(row)]
        if request.HasField("min_updated_at"):
            rows = [row for row in rows if row.updated_at >= request.min_updated_at]
        return rows

    def is_fresh(self, row: Row) -> bool:
        """Whether a READY row's worker has been heard of lately."""
        return row.updated_at > 0 and self._ages.row_age_s(row) <= self._heartbeat_timeout_s

    async def _get(self, request: p2p_pb2.GetMetadataRequest) -> tuple[p2p_pb2.GetMetadataResponse | bytes, str]:
        source_id, worker_id = request.mx_source_id, request.worker_id
        if not source_id or not worker_id:
            return p2p_pb2.GetMetadataResponse(found=False), INVALID
        try:
            stored = await self._store.get(source_id, worker_id)
        except StoreError as error:
            logger.error("GetMetadata of worker %r of source %r failed: %s", worker_id, source_id, error)
            return p2p_pb2.GetMetadataResponse(found=False), STORE_ERROR
        answer = p2p_pb2.GetMetadataResponse(mx_source_id=source_id, worker_id=worker_id)
        if stored is None:
            return answer, NOT_FOUND
        answer.found = True
        if stored.identity is not None:
            answer.identity.CopyFrom(stored.identity)
        encoded = answer.SerializeToString() + encode_field(ANSWERED_WORKER, stored.worker)
        if len(encoded) > MAX_MESSAGE_BYTES:
            answer.worker.MergeFromString(stored.worker)
            answer.worker.ClearField("tensors")  # readers of 0.3 lose such a giant; otherwise nobody could read it
            return answer, OK
        return encoded, OK

    async def _update(self, request: p2p_pb2.UpdateStatusRequest) -> tuple[p2p_pb2.UpdateStatusResponse, str]:
        if reason := missing_in_update(request):
            return p2p_pb2.UpdateStatusResponse(success=False, message=reason), INVALID
        key = (request.mx_source_id, request.worker_id, request.worker_rank)
        now = wall_clock_ms()
        known = request.HasField("source_load") and math.isfinite(request.source_load)
        load = request.source_load if known else None
        try:
            found = await self._store.update_status(*key, request.status, now, load)
        except StoreError as error:
            logger.error("UpdateStatus of worker %r rank %d of source %r failed: %s", *key[1:], key[0], error)
            message = f"Failed to update status: {error}"
            return p2p_pb2.UpdateStatusResponse(success=False, message=message), STORE_ERROR
        what = f"rank {request.worker_rank} of worker {request.worker_id} of source {request.mx_source_id}"
        if not found:
            message = f"Failed to update status: there is no {what}"
            return p2p_pb2.UpdateStatusResponse(success=False, message=message), NOT_FOUND
        self._ages.age_s(*key, now)
        return p2p_pb2.UpdateStatusResponse(success=True, message=f"updated {what}"), OK


def missing_in_publish(request: p2p_pb2.PublishMetadataRequest) -> str:
    """What a PublishMetadata request lacks, in the order of the reference server; "" when it is complete."""
    if not request.HasField("identity"):
        return "identity is required"
    if not request.identity.model_name:
        return "identity.model_name is required"
    if not request.worker_id:
        return "worker_id is required"
    if not request.HasField("worker"):
        return "worker is required"
    return excess_in_publish(request)


def excess_in_publish(request: p2p_pb2.PublishMetadataRequest) -> str:
    """What in a PublishMetadata request is too long to be kept; "" when nothing is. Every listing repeats these."""
    identity, worker = request.identity, request.worker
    texts = [identity.model_name, request.worker_id, identity.revision, identity.dtype, identity.quantization]
    texts += [worker.accelerator, worker.metadata_endpoint, worker.agent_name, worker.transfer_engine_session_id]
    if any(len(text) > MAX_TEXT_LEN for text in texts):
        return f"a text is longer than {MAX_TEXT_LEN} characters"
    maps = (identity.extra_parameters, worker.topology)
    if any(sum(len(key) + len(value) for key, value in one.items()) > MAX_MAP_LEN for one in maps):
        return f"extra_parameters or topology is longer than {MAX_MAP_LEN} characters"
    return ""


def missing_in_update(request: p2p_pb2.UpdateStatusRequest) -> str:
    """What is wrong with an UpdateStatus request; "" when it is fine."""
    if not request.mx_source_id:
        return "mx_source_id is required"
    if not request.worker_id:
        return "worker_id is required"
    return "" if request.status in KNOWN_STATUSES else f"invalid status value: {request.status}"


def source_wanted(identity: p2p_pb2.SourceIdentity, request: p2p_pb2.ListSourcesRequest) -> bool:
    """Whether a listing's filters let a source's rows through."""
    if request.HasField("model_name_filter") and identity.model_name != request.model_name_filter:
        return False
    if not request.HasField("min_training_step"):
        return True
    step = training_step(identity)
    return step is not None and step >= request.min_training_step


def encode_field(number: int, data: bytes) -> bytes:
    """A serialized message as the field with that number, at most 15, of another one."""
    length, prefix = len(data), bytes((number << 3 | 2,))
    while length > 0x7F:
        prefix += bytes((length & 0x7F | 0x80,))
        length >>= 7
    return prefix + bytes((length,)) + data
