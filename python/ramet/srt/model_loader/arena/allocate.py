"""Owns which kind of arena a device has."""

import logging
from typing import TYPE_CHECKING

from ramet.srt.model_loader.arena.base import WeightArena
from ramet.srt.model_loader.arena.host import HostWeightArena
from ramet.srt.weights.manifest import WeightManifest

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


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


def allocate_lendable(manifest: WeightManifest, device: "str | torch.device") -> WeightArena:
    """The same of memory that other processes of the host can have, whatever this process has set torch's to be.

    What torch takes in expandable segments can't be lent. The driver's own memory can.

    Raises:
        ValueError, MemoryError, OSError: as `allocate_arena`.
    """
    import torch

    try:
        arena = allocate_arena(manifest, device)
    except torch.OutOfMemoryError as error:  # enough is free, in pieces
        raise MemoryError(str(error).split("\n")[0]) from error
    try:
        arena.share()  # a handle, or the arena's own descriptor: nothing to give back
    except OSError as error:
        logger.info("%s; taking the memory from the driver", error)
    else:
        return arena
    del arena
    return allocate_arena(manifest, device, can_be_put_away=True)
