"""Owns how long a GPU takes for what is launched, without the launches: as in passes that a graph holds."""

import statistics
from collections.abc import Callable

import torch


def seconds_in_graph(run: Callable[[int], object], num_runs: int, num_measurements: int) -> float:
    """The median of what one of `num_runs` runs takes, each given its number; the first measurement doesn't count."""
    run(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for turn in range(num_runs):
            run(turn)
    times = []
    for _ in range(num_measurements):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times[1:]) / num_runs
