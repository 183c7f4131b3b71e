"""Owns filling an arena from a seed on the same host: mapping its memory, or copying it."""

import os

from ramet.srt.model_loader.local_share import request_memory
from ramet.srt.model_loader.seed_registration import LocalHandle
from ramet.srt.model_loader.sources.file_reader import fill_from_files
from ramet.srt.model_loader.transfer_plan import plan, source_from_manifest, zero_ranges
from ramet.srt.model_loader.weight_arena import WeightArena
from ramet.srt.model_loader.weight_manifest import WeightManifest, layout_digest


class LocalSource:
    """The memory file of a seed's rank. Use as a context manager: the descriptor is closed at the end."""

    def __init__(self, seed_manifest: WeightManifest, handle: LocalHandle, timeout_s: float) -> None:
        """Raises OSError if the seed can't be reached, ValueError if it refuses."""
        self._manifest = seed_manifest
        self._digest = layout_digest(seed_manifest)
        self._fd = request_memory(handle.socket_name, self._digest, timeout_s)

    def __enter__(self) -> "LocalSource":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def can_map(self, arena: WeightArena) -> bool:
        """Whether the seed's memory is laid out as the arena must be."""
        return layout_digest(arena.manifest) == self._digest

    def map(self, arena: WeightArena) -> int:
        """Show the seed's memory in the arena, copy-on-write. It outlives the seed. Returns the bytes shown.

        Raises:
            ValueError: if the memory is not sealed or too small.
        """
        arena.map_seed_memory(self._fd)
        return arena.manifest.payload_nbytes

    def copy(self, arena: WeightArena) -> int:
        """Copy the seed's weights into the arena's own memory, whatever the layouts. Returns the bytes written.

        Raises:
            PlanError: if the seed does not have all of them in the right dtype.
            MemoryError: if they don't fit into memory.
        """
        transfer_plan = plan(arena.manifest, [source_from_manifest("the seed", self._manifest)])
        arena.prepare_fill(zero_ranges(arena.manifest))
        # Read as a file, the seed's memory needs no page tables here: faster than mapping it and copying.
        fill_from_files(transfer_plan.ops, [self._fd], arena)
        return transfer_plan.nbytes
