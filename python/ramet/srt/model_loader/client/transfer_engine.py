"""Owns filling an arena from seeds on other hosts with Mooncake's one-sided reads."""

from collections.abc import Iterator, Sequence

from ramet.srt.model_loader.arena.base import ReceiveWindow, WeightArena
from ramet.srt.model_loader.transport.receivers import normal_session_id
from ramet.srt.model_loader.transport.transport_process import TransportProcess
from ramet.srt.weights.copy_op import CopyOp, split_op
from ramet.srt.weights.registration import SeedAnswer

MAX_BATCH_BYTES = 64 << 20  # the time limit is per batch, so this is also the grain of "progress"
MAX_BATCH_RANGES = 256
MIN_DIRECT_ROW_BYTES = 1 << 20
# What a range costs beside its bytes, in bytes that could have been moved meanwhile: 60 us at 1.2 GB/s over TCP.
RANGE_COST_BYTES = {"tcp": 64 << 10}
RDMA_RANGE_COST_BYTES = 4 << 10


class TransferEngineSource:
    """One rank of a seed, read over the network."""

    name = "transfer_engine"
    measured_seconds = 0.0

    def __init__(self, answer: SeedAnswer, arena: WeightArena, engine: TransportProcess, timeout_s: float) -> None:
        """
        Args:
            engine: stays the caller's, who ends it after `close` or `cut_off`.
            timeout_s: longest time without progress (per step).
        """
        self._arena = arena
        self._engine = engine
        self._timeout_s = timeout_s
        self._session_id = normal_session_id(answer.session_id)
        self._base = 0 if answer.manifest is None else answer.arena_address or 0
        self._window: ReceiveWindow | None = None
        self._address = 0  # of the window, in the transport process

    def make_steps(self, ops: Sequence[CopyOp]) -> list[list[CopyOp]]:
        """The operations in batches, bounded in bytes and in number of ranges."""
        return list(make_batches(ops, RANGE_COST_BYTES.get(self._engine.protocol, RDMA_RANGE_COST_BYTES)))

    def run(self, step: list[CopyOp]) -> None:
        """Read one batch.

        Raises:
            WeightTransferError: if the seed fails or stalls. The engine must be ended then.
        """
        if self._window is None:
            self._window = self._arena.open_receive_window(MAX_BATCH_BYTES)
            fds, sizes = zip(*self._window.files, strict=True)
            self._address = self._engine.open_window(fds, sizes)
        local = [self._address + start for start in self._window.place(step)]
        remote = [self._base + op.source_offset for op in step]
        nbytes = [op.source_span_nbytes for op in step]
        self._engine.read(self._session_id, local, remote, nbytes, self._timeout_s)
        self._window.deliver(step)

    def close(self) -> None:
        """Give the window back, after every read has ended well."""
        if self._window is not None:
            self._window.finish()
            self._window.close()

    def cut_off(self) -> None:
        """Part from a seed that may still send: with the process that would receive it."""
        self._engine.kill()
        if self._window is not None:
            self._window.close()


def make_batches(ops: Sequence[CopyOp], range_cost: int) -> Iterator[list[CopyOp]]:
    """The operations in batches that are bounded in bytes and in number.

    Short rows are read together with what lies between them, where that is cheaper than one by one.

    Args:
        range_cost: bytes that can be moved in the time that another range takes.
    """
    batch: list[CopyOp] = []
    nbytes = 0
    for op in ops:
        for part in _reads_of(op, range_cost):
            if batch and (nbytes + part.source_span_nbytes > MAX_BATCH_BYTES or len(batch) == MAX_BATCH_RANGES):
                yield batch
                batch, nbytes = [], 0
            batch.append(part)
            nbytes += part.source_span_nbytes
    if batch:
        yield batch


def _reads_of(op: CopyOp, range_cost: int) -> Iterator[CopyOp]:
    """An operation as reads: its rows, or spans of several rows."""
    one_by_one = op.num_rows * (op.row_nbytes + range_cost)
    if op.row_nbytes >= MIN_DIRECT_ROW_BYTES or one_by_one <= op.source_span_nbytes + range_cost:
        for row in op.rows():
            yield from split_op(row, MAX_BATCH_BYTES)
        return
    rows_of_each = max(1, MAX_BATCH_BYTES // max(op.source_stride, op.row_nbytes))
    yield from split_op(op, rows_of_each * op.row_nbytes)
