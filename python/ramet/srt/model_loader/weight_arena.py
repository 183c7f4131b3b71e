"""Owns the one allocation that holds a rank's weights, and the parameters' views into it. Moves no bytes itself."""

import ctypes
import math
import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ramet.srt.model_loader import host_memory
from ramet.srt.model_loader.threads import run_in_threads
from ramet.srt.model_loader.weight_boxes import ByteRange
from ramet.srt.model_loader.weight_manifest import WeightChecksums, WeightEntry, WeightManifest, align_up, dtype_name

if TYPE_CHECKING:
    import torch

    from ramet.srt.model_loader.receive_window import ReceiveWindow

POPULATE_BLOCK_BYTES = 32 << 20


class WeightArena(ABC):
    """A rank's weights at addresses that never change, on some device."""

    device: str  # "cpu" or "cuda"
    checksum_algorithm: str
    nbytes: int
    address: int

    def __init__(self, manifest: WeightManifest) -> None:
        self.manifest = manifest
        self.checksums: WeightChecksums | None = None  # of what is in it, once a source has made sure
        self.is_published = False

    @staticmethod
    def allocate(manifest: WeightManifest, device: Any) -> "WeightArena":
        """The arena for a manifest on a device: "cpu", "cuda", "cuda:1" or a torch.device.

        Raises:
            ValueError: if there are no arenas on such a device.
            MemoryError: if the device does not have the memory.
        """
        kind = str(device).split(":")[0]
        if kind == "cpu":
            return HostWeightArena(manifest)
        if kind == "cuda":
            from ramet.srt.model_loader.cuda_weight_arena import CudaWeightArena

            return CudaWeightArena(manifest, str(device))
        raise ValueError(f"there is no weight arena for the device {str(device)!r}; use cpu or cuda")

    def bind(self, model: "torch.nn.Module") -> None:
        """Make every parameter of the model a view into the arena; tied ones stay one object.

        Raises:
            ValueError: if a parameter is not in the manifest, or has another shape or dtype there.
        """
        import torch

        entries = {name: entry for entry in self.manifest.entries for name in (entry.name, *entry.aliases)}
        bound: dict[str, torch.nn.Parameter] = {}
        for name, parameter in list(model.named_parameters(remove_duplicate=False)):
            entry = entries.get(name)
            if entry is None:
                raise ValueError(f"parameter {name} is not in the arena's manifest")
            if tuple(parameter.shape) != entry.shape or dtype_name(parameter.dtype) != entry.dtype:
                raise ValueError(
                    f"parameter {name} is {tuple(parameter.shape)} {dtype_name(parameter.dtype)}, "
                    f"but {entry.shape} {entry.dtype} in the arena's manifest"
                )
            if entry.name not in bound:
                view = torch.nn.Parameter(self.tensor(entry), requires_grad=False)
                view.__dict__.update(parameter.__dict__)
                bound[entry.name] = view
            module_name, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(module_name), attribute, bound[entry.name])

    @abstractmethod
    def tensor(self, entry: WeightEntry) -> "torch.Tensor":
        """The entry's view into the arena, of the entry's shape and dtype."""

    @abstractmethod
    def prepare_fill(self, zeroed: Iterable[ByteRange]) -> None:
        """Get the own memory ready for a source that writes to it.

        Args:
            zeroed: byte ranges to clear, because the source will not write them.

        Raises:
            MemoryError: if less memory is free than the arena still has to take. It is an error now rather than
                a killed process later.
        """

    @abstractmethod
    def open_receive_window(self) -> "ReceiveWindow":
        """Addresses for a writer that may have to be abandoned."""

    @abstractmethod
    def drop_memory(self) -> None:
        """Part the arena from what an abandoned writer may still write to; the content is lost."""

    @abstractmethod
    def read_bytes(self, start: int, stop: int) -> bytes:
        """A few of the arena's bytes, on the host."""

    def publish(self) -> None:
        """Declare the content final: from now on others may read it, and no source may fill it."""
        self.is_published = True

    def _require_private(self) -> None:
        if self.is_published:
            raise RuntimeError("a published arena is immutable")


class HostWeightArena(WeightArena):
    """An arena in host memory: one memfd, mapped once.

    The mapping lives until this object and every tensor that views it are gone. It takes no memory
    until somebody fills it, so that another process's arena can be mapped in its place at no cost.
    """

    device = "cpu"
    checksum_algorithm = "xxh3_64"

    def __init__(self, manifest: WeightManifest) -> None:
        super().__init__(manifest)
        self.nbytes = max(align_up(manifest.arena_nbytes, host_memory.PAGE_BYTES), host_memory.PAGE_BYTES)
        self.address = host_memory.reserve_addresses(self.nbytes)
        self._buffer = host_memory.view_memory(self.address, self.nbytes)
        weakref.finalize(self._buffer, host_memory.unmap, self.address, self.nbytes).atexit = False
        self._own_fd = host_memory.create_memfd("ramet-weights", self.nbytes)
        weakref.finalize(self, os.close, self._own_fd).atexit = False
        self._mapped_fd: int | None = None  # somebody else's memfd that is mapped in place of ours
        self._map_own()

    @property
    def memory(self) -> memoryview:
        """All bytes of the arena, writable."""
        return memoryview(self._buffer).cast("B")

    @property
    def fd(self) -> int:
        """The memfd whose content the arena shows: what a process on the same host can map."""
        return self._own_fd if self._mapped_fd is None else self._mapped_fd

    @property
    def own_fd(self) -> int:
        """The memfd of the own memory."""
        return self._own_fd

    @property
    def is_mapped(self) -> bool:
        """Whether another process's arena is mapped in place of own memory."""
        return self._mapped_fd is not None

    def tensor(self, entry: WeightEntry) -> "torch.Tensor":
        import torch

        dtype = getattr(torch, entry.dtype)
        if entry.nbytes == 0:
            return torch.empty(entry.shape, dtype=dtype)
        count = math.prod(entry.shape)
        return torch.frombuffer(self._buffer, dtype=dtype, count=count, offset=entry.offset).view(entry.shape)

    # Memory

    def read_bytes(self, start: int, stop: int) -> bytes:
        return bytes(self.memory[start:stop])

    def prepare_fill(self, zeroed: Iterable[ByteRange]) -> None:
        self._require_private()
        self.restore_own_memory()
        if host_memory.resident_file_nbytes(self._own_fd):  # a fresh file is all zeros
            for start, stop in zeroed:
                ctypes.memset(self.address + start, 0, stop - start)
        needed = self.nbytes - host_memory.resident_file_nbytes(self._own_fd)
        available = host_memory.available_memory_nbytes()
        if needed > available:
            raise MemoryError(
                f"the weights of rank {self.manifest.parallel.world_rank} need {needed / 1e9:.2f} GB more memory, "
                f"but only {available / 1e9:.2f} GB are available"
            )

    def populate(self, address: int | None = None) -> None:
        """Take all memory now, with several threads: for a writer that is slow at the first touch of a page.

        Args:
            address: of another mapping of the arena's memory; the arena's own when not given.
        """
        start = self.address if address is None else address
        blocks = range(0, self.nbytes, POPULATE_BLOCK_BYTES)

        def populate_block(offset: int) -> None:
            host_memory.populate(start + offset, min(POPULATE_BLOCK_BYTES, self.nbytes - offset))

        run_in_threads(blocks, lambda: populate_block, "populate")

    def map_seed_memory(self, fd: int) -> None:
        """Show another arena's memfd at the arena's addresses, copy-on-write, and give the own memory back.

        The descriptor is kept (duplicated), so that the memory outlives the process that made it.

        Raises:
            ValueError: if the file is too small, or could change or shrink under the mapping.
            OSError: if it can't be mapped.
        """
        self._require_private()
        size = os.fstat(fd).st_size
        if size < self.nbytes:
            raise ValueError(f"the memory offered holds {size} bytes, the arena needs {self.nbytes}")
        if not host_memory.is_sealed_for_sharing(fd):
            raise ValueError("the memory offered is not sealed: it could change or shrink while it is mapped")
        kept = os.dup(fd)
        try:
            host_memory.map_file_at(self.address, self.nbytes, kept, private=True)
        except OSError:
            os.close(kept)
            raise
        self.drop_memory()
        self._mapped_fd = kept
        self._mapped_closer = weakref.finalize(self, os.close, kept)
        self._mapped_closer.atexit = False

    def restore_own_memory(self) -> None:
        """Show the own (empty) memfd again, after `map_seed_memory`."""
        self._require_private()
        if self._mapped_fd is not None:
            self._map_own()
            self._mapped_fd = None
            self._mapped_closer()

    def drop_memory(self) -> None:
        """Give the own memory back: the arena reads as zeros, and who still writes to the old pages harms nobody."""
        self._require_private()
        host_memory.drop_file_memory(self._own_fd, self.nbytes)

    def publish(self) -> None:
        """Declare the content final: from now on others may map or read it, and no source may fill it."""
        if self._mapped_fd is None:
            host_memory.seal_for_sharing(self._own_fd)
        super().publish()

    def open_receive_window(self) -> "ReceiveWindow":
        from ramet.srt.model_loader.receive_window import HostReceiveWindow

        self._require_private()
        return HostReceiveWindow(self)

    def _map_own(self) -> None:
        host_memory.map_file_at(self.address, self.nbytes, self._own_fd, private=False)
