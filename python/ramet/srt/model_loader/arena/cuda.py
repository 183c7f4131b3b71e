"""Owns the weight arena in a GPU's memory: one allocation and the views into it. Moves no bytes itself."""

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

import torch

from ramet.srt.model_loader.arena.base import ReceiveWindow, WeightArena
from ramet.srt.model_loader.arena.cuda_rows import scatter_device_rows
from ramet.srt.utils import cuda_driver
from ramet.srt.weights.boxes import ByteRange
from ramet.srt.weights.copy_op import CopyOp
from ramet.srt.weights.manifest import WeightEntry, WeightManifest, align_up

SEGMENT_ALIGNMENT = 2 << 20  # what the caching allocator rounds a large allocation up to: nothing shares the segment
NUM_RECEIVE_BATCHES = 3  # of a receive window


@contextlib.contextmanager
def current_context(device: torch.device) -> Iterator[None]:
    """Make a device's CUDA context the calling thread's, for calls into the driver."""
    with torch.cuda.device(device):
        torch.cuda.mem_get_info(device)  # choosing a device does not bind its context; the first runtime call does
        yield


class CudaWeightArena(WeightArena):
    """An arena in one segment of the caching allocator, so that one handle and one registration cover it.

    Copies into it run on `stream`, which belongs to a pool of its own: it is never one that captures a graph.
    """

    device = "cuda"
    checksum_algorithm = "mix64"

    def __init__(self, manifest: WeightManifest, device: str) -> None:
        super().__init__(manifest)
        self.torch_device = torch.device(device)
        if self.torch_device.index is None:
            self.torch_device = torch.device("cuda", torch.cuda.current_device())
        self.nbytes = max(SEGMENT_ALIGNMENT, align_up(manifest.arena_nbytes, SEGMENT_ALIGNMENT))
        free, total = torch.cuda.mem_get_info(self.torch_device)
        if self.nbytes > free:
            raise MemoryError(
                f"the weights of rank {manifest.parallel.world_rank} need {self.nbytes / 1e9:.2f} GB, but of the "
                f"{total / 1e9:.2f} GB of GPU {self.torch_device.index} only {free / 1e9:.2f} GB are free; "
                "nvidia-smi shows who has the rest"
            )
        self.buffer = torch.empty(self.nbytes, dtype=torch.uint8, device=self.torch_device)
        self.address = self.buffer.data_ptr()
        self.stream = torch.cuda.Stream(self.torch_device, priority=-1)

    def tensor(self, entry: WeightEntry) -> torch.Tensor:
        dtype = getattr(torch, entry.dtype)
        if entry.nbytes == 0:
            return torch.empty(entry.shape, dtype=dtype, device=self.torch_device)
        assert entry.nbytes == math.prod(entry.shape) * dtype.itemsize
        return self.buffer[entry.offset : entry.offset + entry.nbytes].view(dtype).view(entry.shape)

    def work_context(self) -> contextlib.AbstractContextManager[object]:
        return torch.cuda.stream(self.stream)

    def byte_tensor(self) -> torch.Tensor:
        return self.buffer

    def prepare_fill(self, zeroed: Iterable[ByteRange]) -> None:
        self._require_private()
        with torch.cuda.stream(self.stream):
            for start, stop in zeroed:
                self.buffer[start:stop].zero_()
        self.stream.synchronize()

    def open_receive_window(self, max_batch_nbytes: int) -> ReceiveWindow:
        self._require_private()
        return CudaReceiveWindow(self, max_batch_nbytes)

    def drop_memory(self) -> None:
        """Nobody but this process writes to the arena itself: there is nothing to part from."""
        self._require_private()

    def export_memory(self) -> tuple[bytes, int]:
        """A CUDA IPC handle of the memory around the arena, and where in it the arena starts.

        Raises:
            OSError: if the memory can't be lent to other processes.
        """
        with current_context(self.torch_device):
            return cuda_driver.export_memory(self.address)

    def read_bytes(self, start: int, stop: int) -> bytes:
        with torch.cuda.stream(self.stream):
            return self.buffer[start:stop].cpu().numpy().tobytes()


class CudaReceiveWindow(ReceiveWindow):
    """Pinned host memory for a few batches, each copied on to the GPU while the next one comes.

    So any transport can fill the arena, with and without access to the GPU's memory, and one that was given up can
    never write there.
    """

    def __init__(self, arena: CudaWeightArena, max_batch_nbytes: int) -> None:
        self._arena = arena
        self._batch_nbytes = max_batch_nbytes
        self.nbytes = NUM_RECEIVE_BATCHES * max_batch_nbytes
        with torch.cuda.device(arena.torch_device):
            self._memory = torch.empty(self.nbytes, dtype=torch.uint8, pin_memory=True)
            self._copied = [torch.cuda.Event() for _ in range(NUM_RECEIVE_BATCHES)]
        self.address = self._memory.data_ptr()
        self._count = 0

    def place(self, batch: Sequence[CopyOp]) -> list[int]:
        self._copied[self._count % NUM_RECEIVE_BATCHES].synchronize()
        return [self.address + start for start in self._starts(batch)]

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

    def cut_off(self) -> None:
        """What arrives late stays in the window's own memory, which is never given back then."""
        self._arena.stream.synchronize()
        _abandoned.append(self._memory)

    def close(self) -> None:
        """The memory goes with the object."""

    def _starts(self, batch: Sequence[CopyOp]) -> list[int]:
        """Where in the window each operation of the current batch stands."""
        first = self._count % NUM_RECEIVE_BATCHES * self._batch_nbytes
        lengths = (op.source_span_nbytes for op in batch[:-1])
        return [first + start for start in itertools.accumulate(lengths, initial=0)]


_abandoned: list[torch.Tensor] = []  # windows that a transport may still write to
