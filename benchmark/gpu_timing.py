"""Owns the timing of work that a GPU does."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from bench_common import timed

WARM_UPS = 3


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def time_on(device: torch.device, function: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of a function's work in each of several rounds, by a GPU's events where there is one."""
    for _ in range(WARM_UPS):
        function()
    if device.type == "cpu":
        return [timed(function) for _ in range(repeats)]
    times = []
    with on_device(device):
        for _ in range(repeats):
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            function()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop) / 1e3)
    return times
