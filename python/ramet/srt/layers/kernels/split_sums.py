"""Owns the counters of kernels whose programs each make a part of a sum, of which the last to come adds them up."""

import functools

import torch

MAX_TILES = 1024  # of a launch that counts


@functools.cache
def counts_of(device: torch.device) -> torch.Tensor:
    """int32 [MAX_TILES], zeros whenever no kernel runs. All passes on a device share them, one after the other.

    Raises:
        RuntimeError: if it is first called while a graph is captured: the graph would have the memory, and set it to
            zero by itself alone, not before the first of the other graphs.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("the counters of split sums must be there before graphs are captured")
    return torch.zeros(MAX_TILES, dtype=torch.int32, device=device)
