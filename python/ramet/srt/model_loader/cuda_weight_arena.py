"""Owns the weight arena in a GPU's memory: one allocation and the views into it. Moves no bytes itself."""

import math
from collections.abc import Iterable

import torch

from ramet.srt.model_loader import cuda_ipc
from ramet.srt.model_loader.weight_arena import WeightArena
from ramet.srt.model_loader.weight_boxes import ByteRange
from ramet.srt.model_loader.weight_manifest import WeightEntry, WeightManifest, align_up

SEGMENT_ALIGNMENT = 2 << 20  # what the caching allocator rounds a large allocation up to: nothing shares the segment


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

    def prepare_fill(self, zeroed: Iterable[ByteRange]) -> None:
        self._require_private()
        with torch.cuda.stream(self.stream):
            for start, stop in zeroed:
                self.buffer[start:stop].zero_()
        self.stream.synchronize()

    def export_memory(self) -> tuple[bytes, int]:
        """A CUDA IPC handle of the memory around the arena, and where in it the arena starts.

        Raises:
            OSError: if the memory can't be lent to other processes.
        """
        with torch.cuda.device(self.torch_device):
            return cuda_ipc.export_memory(self.address)

    def read_bytes(self, start: int, stop: int) -> bytes:
        with torch.cuda.stream(self.stream):
            return self.buffer[start:stop].cpu().numpy().tobytes()
