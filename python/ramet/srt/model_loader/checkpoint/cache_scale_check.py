"""Owns what must be true of the scales of an fp8 KV cache in an arena, wherever they came from. See `cache_scales`."""

import math

import torch

from ramet.srt.model_loader.arena.base import WeightArena
from ramet.srt.model_loader.checkpoint.cache_scales import is_cache_scale


def check_cache_scale(value: float, name: str, where: str) -> None:
    """Raises ValueError, with where it is from, if a scale is none by which keys and values can be divided."""
    if not 0 < value < math.inf:
        raise ValueError(f"{where}: {name} is {value}; a scale of the KV cache must be above 0")


def check_cache_scales(arena: WeightArena, where: str) -> None:
    """Make sure of all scales of the cache in an arena whose content is complete.

    Args:
        where: what has brought them, for messages.

    Raises:
        ValueError: if one is not above 0, or no finite number.
    """
    names, scales = list[str](), list[torch.Tensor]()
    with arena.work_context():
        for entry in arena.manifest.entries:
            for box in entry.boxes:
                if is_cache_scale(box.checkpoint_name):
                    names.append(box.checkpoint_name)
                    scales.append(arena.tensor(entry)[tuple(slice(*bounds) for bounds in box.target)].flatten())
        values = torch.cat(scales).tolist() if scales else []
    for name, value in zip(names, values, strict=True):
        check_cache_scale(value, name, where)
