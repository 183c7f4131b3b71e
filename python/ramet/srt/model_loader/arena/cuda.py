"""Owns the weight arena in a GPU's memory: one allocation, the views into it, and the windows that fill it."""

import contextlib
import itertools
import math
import mmap
import os
from collections.abc import Callable, Iterable, Sequence

import torch

from ramet.srt.model_loader.arena.base import (
    LentFile,
    LentMemory,
    MemoryShare,
    ReceiveBuffer,
    ReceiveWindow,
    SeedFile,
    SeedMemory,
    SharedFile,
    WeightArena,
)
from ramet.srt.model_loader.arena.cuda_ipc import CudaIpcMemory
from ramet.srt.model_loader.arena.cuda_memory import CudaMemory, PinnedMemory, ReturnableMemory, SegmentMemory
from ramet.srt.model_loader.arena.cuda_pinned import pin_memory, unpin_memory
from ramet.srt.model_loader.arena.cuda_reader import fill_cuda_from_files
from ramet.srt.model_loader.arena.cuda_rows import scatter_device_rows
from ramet.srt.utils import host_memory
from ramet.srt.weights.boxes import ByteRange
from ramet.srt.weights.copy_op import CopyOp
from ramet.srt.weights.manifest import WeightEntry, WeightManifest, align_up

SEGMENT_ALIGNMENT = 2 << 20  # what the caching allocator rounds a large allocation up to: nothing shares the segment
NUM_RECEIVE_BATCHES = 3  # of a receive window
GATHERED_NBYTES = 2 << 20  # about so many bytes by one index, which is eight times as large
STAGE_RESERVE_NBYTES = 1 << 30  # of free memory that a stage leaves: passes still take some for what lies between
EXCHANGED_NBYTES = 64 << 20  # by one set of copies


class CudaWeightArena(WeightArena):
    """An arena in one piece of memory, so that one handle and one registration cover it.

    Copies into it run on `stream`, which belongs to a pool of its own: it is never one that captures a graph.
    """

    device = "cuda"
    broadcast_backend = "nccl"
    checksum_algorithm = "mix64"
    watched_nbytes = 8 << 30  # a few milliseconds

    def __init__(
        self, manifest: WeightManifest, device: str, kind: Callable[[int, torch.device], CudaMemory] = SegmentMemory
    ) -> None:
        """
        Args:
            kind: makes the memory.

        Raises:
            MemoryError: if there is not enough.
        """
        super().__init__(manifest)
        self.torch_device = torch.device(device)
        if self.torch_device.index is None:
            self.torch_device = torch.device("cuda", torch.cuda.current_device())
        self.gpu_id = self.torch_device.index
        self.nbytes = max(SEGMENT_ALIGNMENT, align_up(manifest.arena_nbytes, SEGMENT_ALIGNMENT))
        self._kind = kind
        if kind is not PinnedMemory:
            self._check_free(manifest)
        self._memory = kind(self.nbytes, self.torch_device)
        self.address = self._memory.buffer.data_ptr()
        self.stream = torch.cuda.Stream(self.torch_device, priority=-1)
        self.spare: torch.Tensor | None = None  # of a stage in host memory: uint8, for what is on its way there
        self._copy: PinnedMemory | None = None  # room for one
        self._has_copy = False

    def _check_free(self, manifest: WeightManifest) -> None:
        free, total = free_nbytes(self.torch_device), torch.cuda.mem_get_info(self.torch_device)[1]
        if self.nbytes > free:
            raise MemoryError(
                f"the weights of rank {manifest.parallel.world_rank} need {self.nbytes / 1e9:.2f} GB, but of the "
                f"{total / 1e9:.2f} GB of GPU {self.torch_device.index} only {free / 1e9:.2f} GB are free; "
                "nvidia-smi shows who has the rest"
            )

    @property
    def buffer(self) -> torch.Tensor:
        """All bytes: uint8, [nbytes]."""
        self._require_memory()
        return self._memory.buffer

    def tensor(self, entry: WeightEntry) -> torch.Tensor:
        dtype = getattr(torch, entry.dtype)
        if entry.nbytes == 0:
            return torch.empty(entry.shape, dtype=dtype, device=self.torch_device)
        assert entry.nbytes == math.prod(entry.shape) * dtype.itemsize
        return self.buffer[entry.offset : entry.offset + entry.nbytes].view(dtype).view(entry.shape)

    def work_context(self) -> contextlib.AbstractContextManager[object]:
        return torch.cuda.stream(self.stream)

    def synchronize(self) -> None:
        torch.cuda.current_stream(self.torch_device).synchronize()

    def make_current(self) -> None:
        torch.cuda.set_device(self.torch_device)

    def host_buffer(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def byte_tensor(self) -> torch.Tensor:
        return self.buffer

    def fill_from_files(self, ops: Sequence[CopyOp], fds: Sequence[int]) -> None:
        fill_cuda_from_files(ops, fds, self.buffer, self.stream)

    def hash_entries(self, entries: Sequence[WeightEntry]) -> tuple[str, ...]:
        from ramet.srt.model_loader.arena.cuda_hash import hash_buffer  # needs triton, which takes its time to import

        with torch.cuda.device(self.torch_device), self.work_context():
            return hash_buffer(entries, self.buffer)

    def quick_samples(self, _entries: Sequence[WeightEntry]) -> tuple[str, ...]:
        """None: whole entries are as fast here."""
        return ()

    def hash_rows(self, starts: Sequence[int], row_nbytes: int, num_rows: int, stride: int) -> str:
        from ramet.srt.model_loader.arena.cuda_hash import gather_and_hash

        with torch.cuda.device(self.torch_device), self.work_context():
            return gather_and_hash(self.buffer, starts, row_nbytes, num_rows, stride)

    def hash_content(self, content: torch.Tensor) -> str:
        from ramet.srt.model_loader.arena.cuda_hash import gather_and_hash

        data = content.view(-1).view(torch.uint8)
        with torch.cuda.device(self.torch_device), self.work_context():
            return gather_and_hash(data, [0], len(data), 1, len(data))

    def prepare_fill(self, zeroed: Iterable[ByteRange]) -> None:
        self._require_private()
        with torch.cuda.stream(self.stream):
            for start, stop in zeroed:
                self.buffer[start:stop].zero_()
        self.stream.synchronize()

    def open_receive_buffer(self) -> ReceiveBuffer:
        self._require_private()
        return CudaReceiveBuffer(self)

    def open_receive_window(self, max_batch_nbytes: int) -> ReceiveWindow:
        self._require_private()
        return CudaReceiveWindow(self, max_batch_nbytes)

    def drop_memory(self) -> None:
        """Nobody but this process writes to the arena itself: there is nothing to part from."""
        self._require_private()

    @property
    def in_host_memory(self) -> bool:
        return isinstance(self._memory, PinnedMemory)

    def _give_back(self, *, keeps_copy: bool) -> None:
        if not isinstance(self._memory, ReturnableMemory):
            raise RuntimeError("the memory of the weights can only be given back with --enable-memory-saver")
        if keeps_copy:
            if self._copy is None:
                self._copy = PinnedMemory(self.nbytes, self.torch_device)
            with self.work_context():
                self._copy.host.copy_(self.buffer, non_blocking=True)
            self.stream.synchronize()
        else:
            self._copy = None
        self._memory.give_back()
        self._has_copy = keeps_copy

    def take_back(self) -> bool:
        if not self._has_copy:
            return False
        assert self._copy is not None and isinstance(self._memory, ReturnableMemory)
        self._memory.take()
        self.is_put_away = False
        with self.work_context():
            self.buffer.copy_(self._copy.host, non_blocking=True)
        self.stream.synchronize()
        return True

    def drop_copy(self, *, keeps_room: bool = False) -> None:
        self._has_copy = False
        if not keeps_room:
            self._copy = None

    def open_stage(self, manifest: WeightManifest) -> "CudaWeightArena":
        """In device memory, if there is enough; otherwise in host memory, of an arena that has its own."""
        device = str(self.torch_device)
        if self.is_put_away:
            return CudaWeightArena(manifest, device, self._kind)
        stage = None
        if self.nbytes <= free_nbytes(self.torch_device) - STAGE_RESERVE_NBYTES:
            # What counts as free may be in pieces, or belong to graphs.
            with contextlib.suppress(MemoryError, torch.OutOfMemoryError):
                stage = CudaWeightArena(manifest, device, self._kind)
        try:
            stage = stage or CudaWeightArena(manifest, device, PinnedMemory)
        except MemoryError as error:
            raise MemoryError(
                f"GPU {self.gpu_id} has no room for other weights of rank {manifest.parallel.world_rank} beside those "
                f"that serve (lower --mem-fraction-static), and the host has none either: {error}"
            ) from error
        if stage.in_host_memory:
            stage.spare = torch.empty(min(EXCHANGED_NBYTES, self.nbytes), dtype=torch.uint8, device=self.torch_device)
        else:
            stage.prepare_swap()
        return stage

    def exchange(self, staged: WeightArena) -> None:
        """Behind the passes that are queued on the calling thread's stream; it waits for them, and for the copies."""
        assert isinstance(staged, CudaWeightArena) and staged.nbytes == self.nbytes
        if self.is_put_away:
            assert isinstance(self._memory, ReturnableMemory) and isinstance(staged._memory, ReturnableMemory)
            self._memory.take_over(staged._memory)
        else:
            self._exchange_bytes(staged)
        self.drop_copy(keeps_room=True)
        super().exchange(staged)

    def _exchange_bytes(self, staged: "CudaWeightArena") -> None:
        if staged.spare is None:
            from ramet.srt.model_loader.arena.cuda_swap import swap

            with torch.cuda.device(self.torch_device):
                swap(self.buffer, staged.buffer)
            self.synchronize()
            return
        pairs = zip(self.buffer.split(EXCHANGED_NBYTES), staged.buffer.split(EXCHANGED_NBYTES), strict=True)
        for mine, theirs in pairs:
            kept = staged.spare[: len(mine)]
            kept.copy_(mine)
            mine.copy_(theirs)
            theirs.copy_(kept)
        self.synchronize()

    def prepare_swap(self) -> None:
        """Have the kernel compiled and loaded while passes go on, by exchanging two parts of what nobody has filled."""
        from ramet.srt.model_loader.arena.cuda_swap import BLOCK_NBYTES, swap  # needs triton

        with torch.cuda.device(self.torch_device), self.work_context():
            swap(self.buffer[:BLOCK_NBYTES], self.buffer[BLOCK_NBYTES : 2 * BLOCK_NBYTES])
        self.stream.synchronize()

    def share(self) -> LentMemory | LentFile:
        self._require_memory()
        try:
            return self._memory.share()
        except OSError as error:
            raise OSError(f"the GPU's memory can't be lent: {error}") from error

    def open_shared(self, share: MemoryShare) -> SeedMemory:
        if isinstance(share, SharedFile):
            return SeedFile(self, share.fd)
        return CudaIpcMemory(share, self.address, self.torch_device)

    def gather(self, ranges: Sequence[ByteRange]) -> bytes:
        with torch.cuda.device(self.torch_device), self.work_context():
            return gather_bytes(self.buffer, ranges)


def free_nbytes(device: torch.device) -> int:
    """Bytes that can be taken: what nobody has, and what the caching allocator has of arenas that are no more."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def gather_bytes(buffer: torch.Tensor, ranges: Sequence[ByteRange]) -> bytes:
    """Bytes from all over a tensor, uint8 [size], in a few operations: each one may have to wait for Python's lock."""
    parts = []
    ends = list(itertools.accumulate(stop - start for start, stop in ranges))
    for _, group in itertools.groupby(zip(ranges, ends, strict=True), lambda one: one[1] // GATHERED_NBYTES):
        chosen = [one for one, _ in group]
        lengths = torch.tensor([stop - start for start, stop in chosen])
        offsets = torch.tensor([start for start, _ in chosen]) - (lengths.cumsum(0) - lengths)
        index = offsets.to(buffer.device).repeat_interleave(lengths.to(buffer.device))
        index += torch.arange(len(index), device=buffer.device)
        parts.append(buffer[index].cpu().numpy().tobytes())
    return b"".join(parts)


class CudaReceiveBuffer(ReceiveBuffer):
    """The arena's own memory: when the group that writes to it is aborted, nothing writes there any more."""

    def __init__(self, arena: CudaWeightArena) -> None:
        self.memory = arena.buffer

    def cut_off(self) -> None:
        """The abort does it."""

    def close(self) -> None:
        """The memory stays the arena's."""


class CudaReceiveWindow(ReceiveWindow):
    """Host memory for a few batches, pinned here, each copied on to the GPU while another process receives the next.

    So any transport can fill the arena, with and without access to the GPU's memory, and one that was given up can
    never write there.
    """

    def __init__(self, arena: CudaWeightArena, max_batch_nbytes: int) -> None:
        self._arena = arena
        self._batch_nbytes = align_up(max_batch_nbytes, host_memory.PAGE_BYTES)
        nbytes = NUM_RECEIVE_BATCHES * self._batch_nbytes
        fd = host_memory.create_memfd("ramet-receive", nbytes)
        self.files = ((fd, nbytes),)
        self._mapping = mmap.mmap(fd, nbytes)
        self._memory = torch.frombuffer(self._mapping, dtype=torch.uint8)
        self._closers = contextlib.ExitStack()
        self._closers.callback(os.close, fd)
        with torch.cuda.device(arena.torch_device):
            # Unpinned memory works too: its copies only keep the calling thread waiting.
            if pin_memory(self._memory, arena.torch_device):
                self._closers.callback(unpin_memory, self._memory, arena.torch_device)
            self._copied = [torch.cuda.Event() for _ in range(NUM_RECEIVE_BATCHES)]
        self._count = 0

    def place(self, batch: Sequence[CopyOp]) -> list[int]:
        self._copied[self._count % NUM_RECEIVE_BATCHES].synchronize()
        return self._starts(batch)

    def deliver(self, batch: Sequence[CopyOp]) -> None:
        with torch.cuda.stream(self._arena.stream):
            for op, start in zip(batch, self._starts(batch), strict=True):
                source = self._memory[start : start + op.source_span_nbytes]
                if op.num_rows == 1:
                    self._arena.buffer[op.target_offset : op.target_stop].copy_(source, non_blocking=True)
                else:
                    scatter_device_rows(op, source.to(self._arena.torch_device, non_blocking=True), self._arena.buffer)
            self._copied[self._count % NUM_RECEIVE_BATCHES].record()
        self._count += 1

    def finish(self) -> None:
        self._arena.stream.synchronize()

    def close(self) -> None:
        """The mapping goes with the object."""
        self._arena.stream.synchronize()
        self._closers.close()

    def _starts(self, batch: Sequence[CopyOp]) -> list[int]:
        """Where in the window each operation of the current batch stands."""
        first = self._count % NUM_RECEIVE_BATCHES * self._batch_nbytes
        lengths = (op.source_span_nbytes for op in batch[:-1])
        return [first + start for start in itertools.accumulate(lengths, initial=0)]
