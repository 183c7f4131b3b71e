"""Owns an arena in host memory: one shared-memory file, which other processes of the host can map."""

import ctypes
import math
import mmap
import os
import weakref
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ramet.srt.model_loader.arena import host_hash
from ramet.srt.model_loader.arena.base import (
    MemoryShare,
    ReceiveBuffer,
    ReceiveWindow,
    SeedFile,
    SharedFile,
    WeightArena,
)
from ramet.srt.model_loader.arena.host_reader import fill_memory_from_files
from ramet.srt.model_loader.arena.host_rows import scatter_rows
from ramet.srt.utils import host_memory
from ramet.srt.utils.threads import run_in_threads
from ramet.srt.weights.boxes import ByteRange
from ramet.srt.weights.manifest import WeightEntry, WeightManifest, align_up

if TYPE_CHECKING:
    import torch

    from ramet.srt.weights.copy_op import CopyOp

POPULATE_BLOCK_BYTES = 32 << 20


class HostWeightArena(WeightArena):
    """An arena in host memory: one memfd, mapped once.

    The mapping lives until this object and every tensor that views it are gone. It takes no memory
    until somebody fills it, so that another process's arena can be mapped in its place at no cost.
    """

    device = "cpu"
    broadcast_backend = "gloo"
    can_pass_on = True
    checksum_algorithm = "xxh3_64"
    watched_nbytes = 256 << 20  # a fortieth of a second of one core

    def __init__(self, manifest: WeightManifest) -> None:
        super().__init__(manifest)
        self.nbytes = max(align_up(manifest.arena_nbytes, host_memory.PAGE_BYTES), host_memory.PAGE_BYTES)
        self.address = host_memory.reserve_addresses(self.nbytes)
        self._buffer = host_memory.view_memory(self.address, self.nbytes)
        weakref.finalize(self._buffer, host_memory.unmap, self.address, self.nbytes).atexit = False
        self._files = _Files(host_memory.create_memfd("ramet-weights", self.nbytes))
        self._copy: _Files | None = None  # while it is put away: what it has shown
        self._show(self._files)

    @property
    def memory(self) -> memoryview:
        """All bytes of the arena, writable."""
        self._require_memory()
        return memoryview(self._buffer).cast("B")

    @property
    def own_fd(self) -> int:
        """The memfd of the own memory."""
        return self._files.own_fd

    def tensor(self, entry: WeightEntry) -> "torch.Tensor":
        import torch

        self._require_memory()
        dtype = getattr(torch, entry.dtype)
        if entry.nbytes == 0:
            return torch.empty(entry.shape, dtype=dtype)
        count = math.prod(entry.shape)
        return torch.frombuffer(self._buffer, dtype=dtype, count=count, offset=entry.offset).view(entry.shape)

    def host_buffer(self, nbytes: int) -> "torch.Tensor":
        import torch

        return torch.empty(nbytes, dtype=torch.uint8)

    # Content

    def fill_from_files(self, ops: "Sequence[CopyOp]", fds: Sequence[int]) -> None:
        fill_memory_from_files(ops, fds, self.memory)

    def hash_entries(self, entries: Sequence[WeightEntry]) -> tuple[str, ...]:
        return host_hash.hash_entries(entries, self.memory)

    def hash_samples(self, entries: Sequence[WeightEntry]) -> tuple[str, ...]:
        return host_hash.hash_samples(entries, self.memory)

    def quick_samples(self, entries: Sequence[WeightEntry]) -> tuple[str, ...]:
        return self.hash_samples(entries)

    def hash_rows(self, starts: Sequence[int], row_nbytes: int, num_rows: int, stride: int) -> str:
        return host_hash.hash_rows(self.memory, starts, row_nbytes, num_rows, stride)

    def hash_content(self, content: "torch.Tensor") -> str:
        return host_hash.hash_content(content)

    # Memory

    def byte_tensor(self) -> "torch.Tensor":
        import torch

        return torch.frombuffer(self.memory, dtype=torch.uint8)

    def gather(self, ranges: Sequence[ByteRange]) -> bytes:
        return b"".join(self.memory[start:stop] for start, stop in ranges)

    def prepare_fill(self, zeroed: Iterable[ByteRange]) -> None:
        self._require_private()
        self.restore_own_memory()
        if host_memory.resident_file_nbytes(self.own_fd):  # a fresh file is all zeros
            for start, stop in zeroed:
                ctypes.memset(self.address + start, 0, stop - start)
        needed = self.nbytes - host_memory.resident_file_nbytes(self.own_fd)
        available = host_memory.available_memory_nbytes()
        if needed > available:
            raise MemoryError(
                f"the weights of rank {self.manifest.parallel.world_rank} need {needed / 1e9:.2f} GB more memory, "
                f"but only {available / 1e9:.2f} GB are available"
            )

    def populate(self) -> None:
        """With several threads."""
        start = self.address
        blocks = range(0, self.nbytes, POPULATE_BLOCK_BYTES)

        def populate_block(offset: int) -> None:
            host_memory.populate(start + offset, min(POPULATE_BLOCK_BYTES, self.nbytes - offset))

        run_in_threads(blocks, lambda: populate_block, "populate")

    def share(self) -> SharedFile:
        """The file whose content the arena shows, which may be another process's."""
        self._require_memory()
        return SharedFile(self._files.shown_fd)

    def open_shared(self, share: MemoryShare) -> "HostSeedFile":
        if not isinstance(share, SharedFile):
            raise ValueError("the seed's memory is on a GPU, this instance's is not")
        return HostSeedFile(self, share.fd)

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
        self._files.take_in(kept)

    def restore_own_memory(self) -> None:
        """Show the own (empty) memfd again, after `map_seed_memory`."""
        self._require_private()
        if self._files.mapped_fd is not None:
            host_memory.map_file_at(self.address, self.nbytes, self.own_fd, private=False)
            self._files.let_go()

    def drop_memory(self) -> None:
        """Give the own memory back: the arena reads as zeros, and who still writes to the old pages harms nobody."""
        self._require_private()
        host_memory.drop_file_memory(self.own_fd, self.nbytes)

    def drop_pages(self, start: int, stop: int) -> None:
        """Give the own memory of a part back that nobody reads any more; another arena's is left to its owner.

        Args:
            start, stop: bytes of the arena; a page that is not wholly between them stays.
        """
        self._require_private()
        first, end = align_up(start, host_memory.PAGE_BYTES), stop // host_memory.PAGE_BYTES * host_memory.PAGE_BYTES
        if first < end and self._files.mapped_fd is None:
            host_memory.drop_file_memory(self.own_fd, end - first, first)

    def publish(self) -> None:
        """Declare the content final: from now on others may map or read it, and no source may fill it."""
        if self._files.mapped_fd is None:
            host_memory.seal_for_sharing(self.own_fd)
        super().publish()

    def _give_back(self, *, keeps_copy: bool) -> None:
        """The pages go with the last file that has them; a copy is the file itself, which nobody shows."""
        empty = _Files(host_memory.create_memfd("ramet-weights", self.nbytes))  # takes no memory yet
        self._show(empty, is_put_away=True)
        self._copy, self._files = self._files if keeps_copy else None, empty

    def take_back(self) -> bool:
        if self._copy is None:
            return False
        self._show(self._copy)
        self._files, self._copy, self.is_put_away = self._copy, None, False
        return True

    def drop_copy(self, *, keeps_room: bool = False) -> None:  # noqa: ARG002  there is never more than what is there
        self._copy = None

    def open_stage(self, manifest: WeightManifest) -> "HostWeightArena":
        return HostWeightArena(manifest)

    def exchange(self, staged: WeightArena) -> None:
        """No byte is copied: the two files trade places. Who has mapped the old one keeps it as it is."""
        assert isinstance(staged, HostWeightArena) and staged.nbytes == self.nbytes
        self._show(staged._files)
        try:
            staged._show(self._files, is_put_away=self.is_put_away)
        except OSError:
            self._show(self._files, is_put_away=self.is_put_away)
            raise
        self._files, staged._files = staged._files, self._files
        self.drop_copy()
        super().exchange(staged)

    def open_receive_buffer(self) -> ReceiveBuffer:
        self._require_private()
        return HostReceiveBuffer(self)

    def open_receive_window(self, max_batch_nbytes: int) -> ReceiveWindow:
        self._require_private()
        return HostReceiveWindow(self, max_batch_nbytes)

    def _show(self, files: "_Files", *, is_put_away: bool = False) -> None:
        """Put files' content at the arena's addresses, in one step; of a sealed file so that writes would stay here.

        Args:
            is_put_away: put nothing there that could be read.
        """
        if is_put_away:
            host_memory.map_no_access_at(self.address, self.nbytes)
            return
        private = host_memory.is_sealed_for_sharing(files.shown_fd)
        host_memory.map_file_at(self.address, self.nbytes, files.shown_fd, private=private)


class _Files:
    """What an arena shows: a memfd of its own, or another arena's in its place. They are closed with this object."""

    def __init__(self, own_fd: int) -> None:
        self.own_fd = own_fd
        self.mapped_fd: int | None = None  # somebody else's
        weakref.finalize(self, os.close, own_fd).atexit = False

    @property
    def shown_fd(self) -> int:
        return self.own_fd if self.mapped_fd is None else self.mapped_fd

    def take_in(self, fd: int) -> None:
        """Show somebody else's file, which is this object's from now on."""
        self.mapped_fd = fd
        self._closer = weakref.finalize(self, os.close, fd)
        self._closer.atexit = False

    def let_go(self) -> None:
        """Close it again."""
        self.mapped_fd = None
        self._closer()


class HostSeedFile(SeedFile):
    """Host memory of another process, which can be mapped too."""

    def __init__(self, arena: HostWeightArena, fd: int) -> None:
        super().__init__(arena, fd)
        self._map = arena.map_seed_memory

    def can_map(self) -> bool:
        return True

    def map(self) -> None:
        self._map(self._fd)


class HostReceiveBuffer(ReceiveBuffer):
    """A second mapping of the arena's own memory, which shows throw-away memory once it is cut off.

    gloo may still write after a time limit.
    """

    def __init__(self, arena: HostWeightArena) -> None:
        import torch

        self._nbytes = arena.nbytes
        self._address = host_memory.reserve_addresses(self._nbytes)
        host_memory.map_file_at(self._address, self._nbytes, arena.own_fd, private=False)
        self.memory = torch.frombuffer(host_memory.view_memory(self._address, self._nbytes), dtype=torch.uint8)

    def cut_off(self) -> None:
        host_memory.map_nothing_at(self._address, self._nbytes)

    def close(self) -> None:
        host_memory.unmap(self._address, self._nbytes)


class HostReceiveWindow(ReceiveWindow):
    """The arena's own memory, and behind it a staging area for rows that come together with what is between them."""

    def __init__(self, arena: HostWeightArena, staging_nbytes: int) -> None:
        staging_nbytes = align_up(staging_nbytes, host_memory.PAGE_BYTES)
        self._arena = arena
        fd = host_memory.create_memfd("ramet-staging", staging_nbytes)
        self._closer = weakref.finalize(self, os.close, fd)
        self._closer.atexit = False
        self._staging = mmap.mmap(fd, staging_nbytes)
        self.files = (arena.own_fd, arena.nbytes), (fd, staging_nbytes)

    def place(self, batch: "Sequence[CopyOp]") -> list[int]:
        """Single rows in their place, others in the staging area."""
        starts = []
        staged = self._arena.nbytes
        for op in batch:
            if op.num_rows == 1:
                starts.append(op.target_offset)
            else:
                starts.append(staged)
                staged += op.source_span_nbytes
        return starts

    def deliver(self, batch: "Sequence[CopyOp]") -> None:
        for op, start in zip(batch, self.place(batch), strict=True):
            if op.num_rows > 1:
                first = start - self._arena.nbytes
                scatter_rows(op, self._arena.memory, memoryview(self._staging)[first : first + op.source_span_nbytes])

    def finish(self) -> None:
        """Nothing is under way."""

    def close(self) -> None:
        """The mapping goes with the object."""
        self._closer()
