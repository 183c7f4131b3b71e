"""Owns filling an arena from a seed on another host with Mooncake's one-sided reads."""

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from ramet.srt.model_loader.mooncake_engine import MooncakeEngine
from ramet.srt.model_loader.seed_registration import SeedAnswer
from ramet.srt.model_loader.transfer_plan import (
    CopyOp,
    Holding,
    PlanError,
    PlanSource,
    plan,
    source_from_manifest,
    zero_ranges,
)
from ramet.srt.model_loader.weight_arena import ReceiveWindow, WeightArena
from ramet.srt.model_loader.weight_boxes import locate_box
from ramet.srt.model_loader.weight_manifest import WeightManifest, element_size

logger = logging.getLogger(__name__)

MAX_BATCH_BYTES = 64 << 20  # the time limit is per batch, so this is also the grain of "progress"
MAX_BATCH_RANGES = 256


class TransferEngineSource:
    """One rank of a seed, read over the network."""

    name = "transfer_engine"

    def __init__(self, answer: SeedAnswer, manifest: WeightManifest) -> None:
        """
        Args:
            manifest: what the client needs.

        Raises:
            PlanError: if the seed does not have it, or in another dtype.
        """
        self.seed_manifest = answer.manifest
        self._session_id = answer.session_id
        self._base = 0 if answer.manifest is None else answer.arena_address or 0
        if answer.manifest is not None:
            source = source_from_manifest("the seed", answer.manifest)
        else:
            source = source_from_names(answer, manifest)
        self.plan = plan(manifest, [source], max_op_nbytes=MAX_BATCH_BYTES)
        self.unfinished: list[CopyOp] = list(self.plan.ops)  # what the arena does not have yet

    def fill(self, arena: WeightArena, host: str, timeout_s: float) -> None:
        """Read everything into the arena's own memory.

        Args:
            host: address of this machine towards the seed.
            timeout_s: longest time without progress (per batch).

        Raises:
            WeightTransferError: if the seed fails or stalls. Nothing of it reaches the arena afterwards.
            MemoryError: if the weights don't fit into memory.
        """
        arena.prepare_fill(zero_ranges(arena.manifest))
        engine = MooncakeEngine.acquire(host, arena.manifest.parallel.world_rank)
        window = arena.open_receive_window(MAX_BATCH_BYTES)
        try:
            engine.register(window.address, window.nbytes)
            # A transport that touches fresh memory page by page is three times slower than one that does not.
            with ThreadPoolExecutor(1, thread_name_prefix="populate") as pool:
                populating = pool.submit(window.populate)
                self._read(engine, window, timeout_s)
            populating.result()
            window.finish()
        except BaseException:
            window.cut_off()
            engine.abandon()
            if engine.protocol != "tcp":
                # A network card writes to pages, not to addresses: leave it those that it has.
                arena.drop_memory()
                self.unfinished = list(self.plan.ops)
            raise
        engine.unregister(window.address)
        window.close()

    def _read(self, engine: MooncakeEngine, window: ReceiveWindow, timeout_s: float) -> None:
        batches = list(make_batches(self.plan.ops))
        for number, batch in enumerate(batches):
            self.unfinished = [op for later in batches[number:] for op in later]
            engine.read(
                self._session_id,
                window.place(batch),
                [self._base + op.source_offset for op in batch],
                [op.row_nbytes for op in batch],
                timeout_s,
            )
            window.deliver(batch)
        self.unfinished = []


def source_from_names(answer: SeedAnswer, manifest: WeightManifest) -> PlanSource:
    """An upstream seed, which says of its tensors only name, address, element count and element size.

    A tensor of the same name and size is taken to be the same slice of the same checkpoint tensors.

    Raises:
        PlanError: if a tensor is missing or of another size.
    """
    holdings: dict[str, list[Holding]] = {}
    missing, different = [], []
    for entry in manifest.entries:
        found = answer.weights_info.get(entry.name)
        size = element_size(entry.dtype)
        if found is None:
            missing.append(entry.name)
        elif found[1] * found[2] != entry.nbytes or found[2] != size:
            different.append(f"{entry.name} ({found[1]} elements of {found[2]} bytes there, "
                             f"{entry.nbytes // size} of {size} here)")  # fmt: skip
        else:
            for box in entry.boxes:
                offset, strides = locate_box(entry, box)
                address = found[0] + offset - entry.offset
                holdings.setdefault(box.checkpoint_name, []).append(Holding(box.source, address, strides, entry.dtype))
    if missing or different:
        raise PlanError(missing, different)
    logger.warning("the seed %s sends no manifest: tensors are matched by name and size, their dtype and their "
                   "content could not be checked", answer.session_id)  # fmt: skip
    return PlanSource(name="the seed", holdings=holdings)


def make_batches(ops: Sequence[CopyOp]) -> Iterator[list[CopyOp]]:
    """The operations as contiguous ones, in batches that are bounded in bytes and in number."""
    batch: list[CopyOp] = []
    nbytes = 0
    for op in ops:
        for part in op.rows():
            if batch and (nbytes + part.nbytes > MAX_BATCH_BYTES or len(batch) == MAX_BATCH_RANGES):
                yield batch
                batch, nbytes = [], 0
            batch.append(part)
            nbytes += part.nbytes
    if batch:
        yield batch
