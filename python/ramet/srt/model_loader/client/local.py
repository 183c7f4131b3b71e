"""Owns filling an arena from a seed on the same host: mapping its memory, or copying it."""

import logging
from collections.abc import Sequence
from contextlib import ExitStack

from ramet.srt.configs.load_config import LoadConfig
from ramet.srt.model_loader.arena.base import WeightArena
from ramet.srt.model_loader.client.seed_instance import SeedRank
from ramet.srt.model_loader.transport.local_share import request_memory
from ramet.srt.weights.copy_op import CopyOp
from ramet.srt.weights.manifest import WeightManifest, layout_digest
from ramet.srt.weights.registration import LocalHandle

logger = logging.getLogger(__name__)

HAND_OVER_TIMEOUT_S = 5.0  # for the seed to hand its memory over; the network is tried after it


class LocalSource:
    """The memory of a seed's rank. Use as a context manager: what was opened is closed at the end."""

    name = "local_copy"
    measured_seconds = 0.0  # of a copy between GPUs

    def __init__(
        self, seed_manifest: WeightManifest, handle: LocalHandle, arena: WeightArena, timeout_s: float
    ) -> None:
        """
        Args:
            timeout_s: for a copy between GPUs. A seed that ends is noticed at once.

        Raises:
            OSError: if the seed can't be reached.
            ValueError: if it refuses, or its memory is of no use here.
        """
        self._arena = arena
        self._digest = layout_digest(seed_manifest)
        self._timeout_s = timeout_s
        self._memory = request_memory(handle.socket_name, self._digest, min(timeout_s, HAND_OVER_TIMEOUT_S))
        try:
            self._shared = arena.open_shared(self._memory.share)
        except BaseException:
            self._memory.__exit__()
            raise

    def __enter__(self) -> "LocalSource":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._shared.close()
        self._memory.__exit__()

    def prepare_copy(self) -> None:
        """Open the memory now, so that where this is not allowed there is still time to go another way.

        Raises:
            OSError: if it can't be opened.
        """
        self._shared.open()

    def can_map(self) -> bool:
        """Whether the seed's memory can stand in for the arena's: it can be shown there, and is laid out equally."""
        return self._shared.can_map() and layout_digest(self._arena.manifest) == self._digest

    def map(self) -> int:
        """Show the seed's memory in the arena, copy-on-write. It outlives the seed. Returns the bytes shown.

        Raises:
            ValueError: if the memory is not sealed or too small.
        """
        self._shared.map()
        return self._arena.manifest.payload_nbytes

    def make_steps(self, ops: Sequence[CopyOp]) -> list[list[CopyOp]]:
        return [list(ops)]

    def run(self, step: list[CopyOp]) -> None:
        """Copy from the seed's memory into the arena's own, whatever the layouts.

        Raises:
            OSError: if the memory is not as large as the seed said, or the seed ends too early.
        """
        self.measured_seconds = self._shared.copy(step, self._memory.seed_is_alive, self._timeout_s)


def open_local(rank: SeedRank, arena: WeightArena, config: LoadConfig, *, for_copy: bool = False) -> LocalSource | None:
    """The rank's memory, if it is on this host and can be had.

    Args:
        for_copy: whether it is to be copied, and not mapped.
    """
    if not rank.is_local:
        return None
    manifest, handle = rank.answer.manifest, rank.answer.local_handle
    assert manifest is not None and handle is not None
    try:
        with ExitStack() as undo:
            source = undo.enter_context(LocalSource(manifest, handle, arena, config.timeout_s))
            if for_copy:
                source.prepare_copy()
            undo.pop_all()
            return source
    except (OSError, ValueError) as error:
        logger.warning(
            "rank %d: the seed %s is on this host, but its memory can't be had (%s); using the network",
            arena.manifest.parallel.world_rank,
            rank.seed,
            error,
        )
        return None
