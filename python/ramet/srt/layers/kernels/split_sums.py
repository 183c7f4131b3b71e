"""Owns the counters of kernels whose programs each make a part of a sum, of which the last to come adds them up."""

import functools

import torch

MAX_TILES = 1024  # of a launch that counts


def counts_of(device: torch.device) -> torch.Tensor:
    """int32 [MAX_TILES], zeros whenever no kernel runs. What runs on one stream shares them, one after the other."""
    return _counts(device, torch.cuda.current_stream(device).stream_id if device.type == "cuda" else 0)


@functools.cache
def _counts(device: torch.device, _stream: int) -> torch.Tensor:
    return torch.zeros(MAX_TILES, dtype=torch.int32, device=device)
