"""Owns the way from what Redis gives to sources and rows, where what is there again is not decoded again."""

import logging
from collections import OrderedDict

import msgspec

from ramet.srt.modelexpress.proto import p2p_pb2
from ramet.srt.modelexpress.server import redis_layout as layout
from ramet.srt.modelexpress.server.store import Row

logger = logging.getLogger(__name__)

SUMMARY_DECODER = msgspec.json.Decoder(layout.SummaryJson)


def unpack_texts(data: bytes) -> list[str]:
    """The texts that LIST packed; one that is not UTF-8 is empty."""
    try:
        return msgspec.msgpack.decode(data, type=list[str])
    except ValueError:
        return [decode_text(raw) for raw in msgspec.msgpack.decode(data, type=list[msgspec.Raw])]


def decode_text(raw: msgspec.Raw) -> str:
    try:
        return msgspec.msgpack.decode(raw, type=str)
    except ValueError:
        return ""


class RecordCache:
    """The records that were asked for last, by their text: many clients ask for the few sources that are idle.

    Args:
        limit_bytes: that texts and records may have together.
    """

    def __init__(self, limit_bytes: int):
        self._limit_bytes = limit_bytes
        self._num_bytes = 0
        self._records: OrderedDict[bytes, layout.StoredRecord] = OrderedDict()  # the one used last at the end

    def get(self, text: bytes) -> layout.StoredRecord | None:
        record = self._records.get(text)
        if record is not None:
            self._records.move_to_end(text)
        return record

    def put(self, text: bytes, record: layout.StoredRecord) -> None:
        """Keep it, and let go of as many old ones as that takes."""
        if text not in self._records:
            self._num_bytes += len(text) + len(record.encoded)
        self._records[text] = record
        while self._num_bytes > self._limit_bytes:
            old_text, old = self._records.popitem(last=False)
            self._num_bytes -= len(old_text) + len(old.encoded)


class KnownSource:
    """A source as it was read last. What is there again in the same words is not decoded again.

    Args:
        attributes: of the source, as JSON.
        texts: worker id and summary, in turns, of every rank. What cannot be read is left out.
        last: the source as it was read before.
    """

    def __init__(self, source_id: str, attributes: str, texts: list[str], last: "KnownSource | None"):
        self.attributes = attributes
        self.rows: dict[tuple[str, str], Row] = {}  # by worker id and summary
        self.identity: p2p_pb2.SourceIdentity
        if last is not None and last.attributes == attributes:
            self.identity = last.identity
        else:
            self.identity = read_identity(source_id, attributes)
        known = {} if last is None else last.rows
        for key in zip(texts[::2], texts[1::2], strict=True):
            row = known.get(key) or read_row(source_id, *key)
            if row is not None:
                self.rows[key] = row


def read_identity(source_id: str, attributes: str) -> p2p_pb2.SourceIdentity:
    """The identity in a source's attributes; an empty one if it cannot be read."""
    try:
        return layout.decode_identity(attributes.encode())
    except ValueError:
        logger.warning("the identity of source %s in Redis cannot be read", source_id)
        return p2p_pb2.SourceIdentity()


def read_row(source_id: str, worker_id: str, summary: str) -> Row | None:
    """The row of a worker with that summary; None if it cannot be read."""
    try:
        if not worker_id:
            raise ValueError("its name is no text")
        return make_row(source_id, worker_id, SUMMARY_DECODER.decode(summary))
    except ValueError:
        logger.warning("the row of worker %s of source %s in Redis cannot be read", worker_id, source_id)
        return None


def make_row(source_id: str, worker_id: str, summary: layout.SummaryJson) -> Row:
    return Row(
        source_id=source_id,
        worker_id=worker_id,
        worker_rank=summary.worker_rank,
        status=summary.status,
        updated_at=summary.updated_at,
        accelerator=summary.accelerator,
        source_load=summary.source_load if isinstance(summary.source_load, float) else None,
        topology=summary.topology,
    )
