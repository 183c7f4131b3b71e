"""Owns which kind of arena a device has."""

from typing import TYPE_CHECKING

from ramet.srt.model_loader.arena.base import WeightArena
from ramet.srt.model_loader.arena.host import HostWeightArena
from ramet.srt.weights.manifest import WeightManifest

if TYPE_CHECKING:
    import torch


def allocate_arena(
    manifest: WeightManifest, device: "str | torch.device", *, can_be_put_away: bool = False
) -> WeightArena:
    """The arena for a manifest on a device: "cpu", "cuda", "cuda:1" or a torch.device.

    Args:
        can_be_put_away: the memory must be such that it can be given back while the addresses stay.

    Raises:
        ValueError: if there are no arenas on such a device.
        MemoryError: if the device does not have the memory.
        OSError: if it has none that can be given back.
    """
    kind = str(device).split(":")[0]
    if kind == "cpu":
        return HostWeightArena(manifest)
    if kind == "cuda":
        from ramet.srt.model_loader.arena.cuda import CudaWeightArena  # with its readers: for GPUs alone

        if not can_be_put_away:
            return CudaWeightArena(manifest, str(device))
        from ramet.srt.model_loader.arena.cuda_memory import ReturnableMemory

        return CudaWeightArena(manifest, str(device), ReturnableMemory)
    raise ValueError(f"there is no weight arena for the device {str(device)!r}; use cpu or cuda")
