"""Owns what a trace of a rank says about its decode passes: a pure function of the trace's events. Reads no files.

Events are Chrome's ("X" has a start and a duration, both in microseconds), with the categories and names that torch's
Kineto gives them. Passes are found by what managers/rank_profiler.py marks in the trace.
"""

import bisect
import dataclasses
import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

Event = dict[str, Any]

PASS_NAME = re.compile(r"(decode|prefill)_pass\[(\d+)\]")
WAIT_NAME = "wait_for_result"
GPU_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")
CALL_CATEGORIES = ("cuda_runtime", "cuda_driver")
KERNEL_LAUNCH = re.compile(r"cu(da)?Launch(Cooperative)?Kernel")
GRAPH_LAUNCH = re.compile(r"cu(da)?GraphLaunch")
CPU_KERNELS = "ramet::"
# Calls that return only when the device has got somewhere, or may: CUDA's allocations wait for it, too.
WAITING_CALL = re.compile(r"Synchronize|Memcpy|Malloc|Free|HostAlloc|HostRegister")
SLOW_CALL_US = 1000.0  # whatever else takes so long has waited: a launch for room in the queue, for example
NUM_TOP = 10


class Calls(NamedTuple):
    """Calls of one name."""

    name: str
    per_pass: float
    mean_us: float
    max_us: float


class Share(NamedTuple):
    """What took time: a kernel on the GPU, or an operation on the CPU without those that it calls."""

    name: str
    us_per_pass: float
    share: float  # of all of its kind


@dataclasses.dataclass(frozen=True)
class DecodeSummary:
    """Consecutive decode passes of equally many sequences."""

    batch_size: int
    num_passes: int
    pass_ms: float  # from the start of one pass to that of the next, on the host
    has_gpu: bool
    gpu_busy: float  # share of the time in which a kernel or a copy runs
    largest_gap_us: float  # in which none does
    result_waits: list[Calls]  # while the host waits for the tokens of a pass
    other_waits: list[Calls]
    kernel_launches: float  # calls per pass; those inside of a graph are none
    graph_launches: float
    launch_us: float  # of the host per pass, in all launches
    kernels: list[Share]
    cpu_ops: list[Share]  # only without a GPU


def summarize_decode(events: Sequence[Event], num_passes: int) -> DecodeSummary:
    """What the last `num_passes` of the trace's longest row of equal decode passes did; of fewer if it is shorter.

    Raises:
        ValueError: if there are no two such passes in a row.
    """
    events = [event for event in events if event.get("ph") == "X"]
    batch_size, starts = _longest_row(events)
    starts = starts[-(num_passes + 1) :]
    start, stop, count = starts[0], starts[-1], len(starts) - 1
    work = [event for event in events if event.get("cat") in GPU_CATEGORIES]
    busy, largest_gap = _busy_and_gap(work, start, stop)
    calls = [event for event in events if event.get("cat") in CALL_CATEGORIES and start <= event["ts"] < stop]
    kernel_launches = [call for call in calls if KERNEL_LAUNCH.match(call["name"])]
    graph_launches = [call for call in calls if GRAPH_LAUNCH.match(call["name"])]
    result_waits, other_waits = _waits(calls, events, count)
    kernels = [(event["name"], *_clip(event, start, stop)) for event in work if event["cat"] == "kernel"]
    return DecodeSummary(
        batch_size=batch_size,
        num_passes=count,
        pass_ms=(stop - start) / count / 1e3,
        has_gpu=bool(work),
        gpu_busy=busy / (stop - start),
        largest_gap_us=largest_gap,
        result_waits=result_waits,
        other_waits=other_waits,
        kernel_launches=len(kernel_launches) / count,
        graph_launches=len(graph_launches) / count,
        launch_us=sum(call["dur"] for call in kernel_launches + graph_launches) / count,
        kernels=_top(((name, end - begin) for name, begin, end in kernels if end > begin), count),
        cpu_ops=[] if work else _top(_self_times(events, start, stop), count),
    )


def _longest_row(events: Iterable[Event]) -> tuple[int, list[float]]:
    """Batch size and starts of the longest row of decode passes that have the same size, with nothing between them."""
    passes = sorted(
        (event["ts"], event["name"])
        for event in events
        if event.get("cat") == "user_annotation" and PASS_NAME.fullmatch(event["name"])
    )
    rows = []
    for name, row in itertools.groupby(passes, key=lambda one: one[1]):
        kind, size = PASS_NAME.fullmatch(name).groups()
        if kind == "decode":
            rows.append((int(size), [start for start, _ in row]))
    longest = max(rows, key=lambda row: len(row[1]), default=(0, []))
    if len(longest[1]) < 2:
        raise ValueError("the trace has no two decode passes of the same size in a row")
    return longest


def _clip(event: Event, start: float, stop: float) -> tuple[float, float]:
    return max(event["ts"], start), min(_end(event), stop)


def _busy_and_gap(work: Iterable[Event], start: float, stop: float) -> tuple[float, float]:
    """Microseconds of [start, stop] that the union of the events covers, and the longest stretch that it doesn't."""
    busy = gap = 0.0
    reached = start
    for begin, end in sorted(_clip(event, start, stop) for event in work):
        if end > reached and begin < stop:
            gap = max(gap, begin - reached)
            busy += end - max(begin, reached)
            reached = end
    return busy, max(gap, stop - reached)


def _waits(calls: Iterable[Event], events: Iterable[Event], num_passes: int) -> tuple[list[Calls], list[Calls]]:
    """The calls that wait: those while the host waits for a pass's tokens, and the others."""
    copies = {event["args"]["correlation"]: event["name"] for event in events if event.get("cat") == "gpu_memcpy"}
    results = sorted(
        (event["ts"], _end(event))
        for event in events
        if event.get("cat") == "user_annotation" and event["name"] == WAIT_NAME
    )
    inside: dict[str, list[float]] = defaultdict(list)
    outside: dict[str, list[float]] = defaultdict(list)
    for call in calls:
        name = call["name"]
        copy = copies.get(call.get("args", {}).get("correlation"), "")
        to_pageable = "Device -> Pageable" in copy
        may_wait = to_pageable if "Async" in name else WAITING_CALL.search(name)
        if may_wait or call["dur"] >= SLOW_CALL_US:
            place = bisect.bisect_right(results, (call["ts"], float("inf"))) - 1
            is_inside = place >= 0 and call["ts"] < results[place][1]
            (inside if is_inside else outside)[f"{name}, {copy}" if copy else name].append(call["dur"])
    return _calls(inside, num_passes), _calls(outside, num_passes)


def _calls(durations: dict[str, list[float]], num_passes: int) -> list[Calls]:
    """The longest in total first."""
    ordered = sorted(durations.items(), key=lambda item: -sum(item[1]))
    return [Calls(name, len(all_) / num_passes, sum(all_) / len(all_), max(all_)) for name, all_ in ordered]


def _self_times(events: Iterable[Event], start: float, stop: float) -> list[tuple[str, float]]:
    """Names and durations of CPU operations, less those of the operations inside them on the same thread."""
    ops = [event for event in events if _is_cpu_op(event) and start <= event["ts"] < stop]
    times = [op["dur"] for op in ops]
    outer: list[int] = []
    for index in sorted(range(len(ops)), key=lambda i: (ops[i]["tid"], ops[i]["ts"], -ops[i]["dur"])):
        op = ops[index]
        while outer and (ops[outer[-1]]["tid"] != op["tid"] or _end(ops[outer[-1]]) <= op["ts"]):
            outer.pop()
        if outer:
            times[outer[-1]] -= op["dur"]
        outer.append(index)
    return [(op["name"], time) for op, time in zip(ops, times, strict=True)]


def _is_cpu_op(event: Event) -> bool:
    """Also of Ramet's kernels for CPUs, which the profiler knows as annotations."""
    return event.get("cat") == "cpu_op" or (
        event.get("cat") == "user_annotation" and event["name"].startswith(CPU_KERNELS)
    )


def _end(event: Event) -> float:
    return event["ts"] + event["dur"]


def _top(times: Iterable[tuple[str, float]], num_passes: int) -> list[Share]:
    totals: dict[str, float] = defaultdict(float)
    for name, time in times:
        totals[name] += time
    whole = sum(totals.values()) or 1.0
    ordered = sorted(totals.items(), key=lambda item: -item[1])
    return [Share(name, time / num_passes, time / whole) for name, time in ordered[:NUM_TOP] if time > 0]
