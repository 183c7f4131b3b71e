"""Owns filling an arena from a seed on the same host: mapping its memory, or copying it."""

import time

from ramet.srt.model_loader.local_share import request_memory
from ramet.srt.model_loader.seed_registration import LocalHandle
from ramet.srt.model_loader.sources.file_reader import fill_from_files
from ramet.srt.model_loader.transfer_plan import plan, source_from_manifest, zero_ranges
from ramet.srt.model_loader.weight_arena import HostWeightArena, WeightArena
from ramet.srt.model_loader.weight_manifest import WeightManifest, layout_digest


class LocalSource:
    """The memory of a seed's rank. Use as a context manager: what was opened is closed at the end."""

    def __init__(self, seed_manifest: WeightManifest, handle: LocalHandle, timeout_s: float) -> None:
        """Raises OSError if the seed can't be reached, ValueError if it refuses."""
        self._manifest = seed_manifest
        self._digest = layout_digest(seed_manifest)
        self._timeout_s = timeout_s
        self.transfer_seconds = 0.0  # of `copy`
        self._memory = request_memory(handle.socket_name, self._digest, timeout_s)

    def __enter__(self) -> "LocalSource":
        return self

    def __exit__(self, *_: object) -> None:
        self._memory.__exit__()

    def can_map(self, arena: WeightArena) -> bool:
        """Whether the seed's memory can stand in for the arena's: host memory on both sides, laid out equally."""
        return (
            isinstance(arena, HostWeightArena)
            and self._memory.fd is not None
            and (layout_digest(arena.manifest) == self._digest)
        )

    def map(self, arena: WeightArena) -> int:
        """Show the seed's memory in the arena, copy-on-write. It outlives the seed. Returns the bytes shown.

        Raises:
            ValueError: if the memory is not sealed or too small.
        """
        assert isinstance(arena, HostWeightArena) and self._memory.fd is not None
        arena.map_seed_memory(self._memory.fd)
        return arena.manifest.payload_nbytes

    def copy(self, arena: WeightArena) -> int:
        """Copy the seed's weights into the arena's own memory, whatever the layouts. Returns the bytes written.

        Raises:
            PlanError: if the seed does not have all of them in the right dtype.
            MemoryError: if they don't fit into memory.
            ValueError: if this arena can't reach the seed's memory.
            OSError: if the seed's memory can't be opened, or it ends too early.
        """
        memory = self._memory
        if memory.cuda_ipc_handle and arena.device != "cuda":
            raise ValueError("the seed's memory is on a GPU, this instance's is not")
        transfer_plan = plan(arena.manifest, [source_from_manifest("the seed", self._manifest)])
        arena.prepare_fill(zero_ranges(arena.manifest))
        start = time.perf_counter()
        if memory.cuda_ipc_handle:
            from ramet.srt.model_loader.sources.cuda_ipc_reader import fill_from_cuda_memory

            fill_from_cuda_memory(
                transfer_plan.ops, memory.cuda_ipc_handle, memory.offset, arena, memory.seed_is_alive, self._timeout_s
            )
        else:
            # Read as a file, the seed's memory needs no page tables here: faster than mapping it and copying.
            assert memory.fd is not None
            fill_from_files(transfer_plan.ops, [memory.fd], arena)
        self.transfer_seconds = time.perf_counter() - start
        return transfer_plan.nbytes
