"""Owns which kind of arena a device has."""

from typing import TYPE_CHECKING

from ramet.srt.model_loader.arena.base import WeightArena
from ramet.srt.model_loader.arena.host import HostWeightArena
from ramet.srt.weights.manifest import WeightManifest

if TYPE_CHECKING:
    import torch


def allocate_arena(manifest: WeightManifest, device: "str | torch.device") -> WeightArena:
    """The arena for a manifest on a device: "cpu", "cuda", "cuda:1" or a torch.device.

    Raises:
        ValueError: if there are no arenas on such a device.
        MemoryError: if the device does not have the memory.
    """
    kind = str(device).split(":")[0]
    if kind == "cpu":
        return HostWeightArena(manifest)
    if kind == "cuda":
        from ramet.srt.model_loader.arena.cuda import CudaWeightArena  # with its readers: for GPUs alone

        return CudaWeightArena(manifest, str(device))
    raise ValueError(f"there is no weight arena for the device {str(device)!r}; use cpu or cuda")
