"""Owns filling an arena from seeds on other hosts with Mooncake's one-sided reads."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from ramet.srt.model_loader.mooncake_engine import MooncakeEngine
from ramet.srt.model_loader.receive_window import ReceiveLane, span_nbytes
from ramet.srt.model_loader.seed_registration import SeedAnswer
from ramet.srt.model_loader.transfer_plan import CopyOp, split_op
from ramet.srt.model_loader.weight_arena import WeightArena

MAX_BATCH_BYTES = 64 << 20  # the time limit is per batch, so this is also the grain of "progress"
MAX_BATCH_RANGES = 256
STAGING_BYTES = 16 << 20  # of each rank that is read in rows
MIN_DIRECT_ROW_BYTES = 1 << 20
# What a range costs beside its bytes, in bytes that could have been moved meanwhile: 60 us at 1.2 GB/s over TCP.
RANGE_COST_BYTES = {"tcp": 64 << 10}
RDMA_RANGE_COST_BYTES = 4 << 10


class EngineReceiver:
    """The client's engine while an arena is filled, and the window through which it writes. All seeds share it."""

    def __init__(self, arena: WeightArena, host: str) -> None:
        """
        Args:
            host: address of this machine towards the seeds.

        Raises:
            WeightTransferError: if Mooncake does not start.
        """
        self.engine = MooncakeEngine.acquire(host, arena.manifest.parallel.world_rank)
        self._window = arena.open_receive_window()
        self._lanes: list[ReceiveLane] = []
        try:
            self._register(self._window.address, self._window.nbytes)
        except BaseException:
            self._window.cut_off()
            raise
        # A transport that touches fresh memory page by page is three times slower than one that does not.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="populate")
        self._populating = self._pool.submit(self._window.populate)

    @property
    def writes_to_pages(self) -> bool:
        """Whether a read that was given up can still reach the arena: a network card knows pages, not addresses."""
        return self.engine.protocol != "tcp"

    def open_lane(self, batch_nbytes: int, staging_nbytes: int) -> ReceiveLane:
        """A way into the arena for one seed rank, which the engine can write to."""
        lane = self._window.open_lane(batch_nbytes, staging_nbytes)
        self._lanes.append(lane)
        self._register(lane.address, lane.nbytes)
        return lane

    def close(self) -> None:
        """Give everything back, after every read has ended well.

        Raises:
            MemoryError: if there was not enough for the arena.
        """
        self._pool.shutdown()
        self._window.finish()
        for memory in (*self._lanes, self._window):
            if memory.nbytes:
                self.engine.unregister(memory.address)
            memory.close()
        self._populating.result()

    def abandon(self) -> None:
        """Part from an engine that may still write: nothing of it reaches the arena from now on."""
        self._window.cut_off()
        self.engine.abandon()
        self._pool.shutdown()

    def _register(self, address: int, nbytes: int) -> None:
        if nbytes:
            self.engine.register(address, nbytes)


class TransferEngineSource:
    """One rank of a seed, read over the network."""

    name = "transfer_engine"

    def __init__(self, answer: SeedAnswer, arena: WeightArena, receiver: EngineReceiver, timeout_s: float) -> None:
        """
        Args:
            timeout_s: longest time without progress (per step).
        """
        self._receiver = receiver
        self._timeout_s = timeout_s
        self._session_id = answer.session_id
        self._base = 0 if answer.manifest is None else answer.arena_address or 0
        self._lane: ReceiveLane | None = None
        self._batch_nbytes = self._staging_nbytes = 0  # the most that a step needs

    def make_steps(self, ops: Sequence[CopyOp]) -> list[list[CopyOp]]:
        """The operations in batches, bounded in bytes and in number of ranges."""
        range_cost = RANGE_COST_BYTES.get(self._receiver.engine.protocol, RDMA_RANGE_COST_BYTES)
        steps = list(make_batches(ops, range_cost))
        self._batch_nbytes = max((sum(map(span_nbytes, step)) for step in steps), default=0)
        self._staging_nbytes = max(
            (sum(span_nbytes(op) for op in step if op.num_rows > 1) for step in steps), default=0
        )
        return steps

    def run(self, step: list[CopyOp]) -> None:
        """Read one batch.

        Raises:
            WeightTransferError: if the seed fails or stalls. The receiver must be abandoned then.
        """
        if self._lane is None:
            self._lane = self._receiver.open_lane(self._batch_nbytes, self._staging_nbytes)
        remote = [self._base + op.source_offset for op in step]
        nbytes = [span_nbytes(op) for op in step]
        self._receiver.engine.read(self._session_id, self._lane.place(step), remote, nbytes, self._timeout_s)
        self._lane.deliver(step)


def make_batches(ops: Sequence[CopyOp], range_cost: int) -> Iterator[list[CopyOp]]:
    """The operations in batches that are bounded in bytes and in number.

    Short rows are read together with what lies between them, where that is cheaper than one by one.

    Args:
        range_cost: bytes that can be moved in the time that another range takes.
    """
    batch: list[CopyOp] = []
    nbytes = staged = 0
    for op in ops:
        for part in _reads_of(op, range_cost):
            size = span_nbytes(part)
            staging = size if part.num_rows > 1 else 0
            is_full = nbytes + size > MAX_BATCH_BYTES or staged + staging > STAGING_BYTES
            if batch and (is_full or len(batch) == MAX_BATCH_RANGES):
                yield batch
                batch, nbytes, staged = [], 0, 0
            batch.append(part)
            nbytes += size
            staged += staging
    if batch:
        yield batch


def _reads_of(op: CopyOp, range_cost: int) -> Iterator[CopyOp]:
    """An operation as reads: its rows, or spans of several rows that fit into the staging buffer."""
    one_by_one = op.num_rows * (op.row_nbytes + range_cost)
    if op.row_nbytes >= MIN_DIRECT_ROW_BYTES or one_by_one <= span_nbytes(op) + range_cost:
        for row in op.rows():
            yield from split_op(row, MAX_BATCH_BYTES)
        return
    rows_of_each = max(1, STAGING_BYTES // max(op.source_stride, op.row_nbytes))
    yield from split_op(op, rows_of_each * op.row_nbytes)
