"""What is read from a trace: a hand-made one, in Kineto's categories and names, whose sums can be done by hand."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmark"))
from decode_trace import Calls, Share, summarize_decode  # noqa: E402 - its folder is made importable above


def event(cat, name, ts, dur, **args):
    return {
        "ph": "X",
        "cat": cat,
        "name": name,
        "ts": ts,
        "dur": dur,
        "pid": 1,
        "tid": args.pop("tid", 1),
        "args": args,
    }


def passes(kind, size, *starts):
    return [event("user_annotation", f"{kind}_pass[{size}]", start, 300) for start in starts]


# Only the last row is long enough; its last two passes are [1000, 3000).
PASSES = [
    *passes("decode", 4, -9000, -8000),
    *passes("prefill", 4, -7000),
    *passes("decode", 2, -6000, -5500, -5000),
    *passes("decode", 4, 0, 1000, 2000, 3000),
]
WORK = [
    event("kernel", "gemv", 900, 400),  # from before the passes
    event("kernel", "gemv", 1400, 500),
    event("kernel", "attention", 1800, 150),  # beside the one before
    event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 1960, 10, correlation=7),
    event("gpu_memset", "Memset (Device)", 1975, 5),
    event("kernel", "gemv", 2000, 1200),  # to after them
    event("kernel", "later", 5000, 100),
]
CALLS = [
    event("cuda_runtime", "cudaLaunchKernel", 500, 9),
    event("cuda_runtime", "cudaLaunchKernel", 1010, 6, correlation=1),
    event("cuda_runtime", "cudaLaunchKernelExC", 2010, 6, correlation=2),
    event("cuda_driver", "cuLaunchKernelEx", 2020, 8, correlation=3),
    event("cuda_runtime", "cudaGraphLaunch", 1020, 50, correlation=4),
    event("cuda_runtime", "cudaGraphLaunch", 2030, 70, correlation=5),
    event("cuda_runtime", "cudaMemcpyAsync", 1080, 4, correlation=7),  # pinned: it doesn't wait
    event("cuda_runtime", "cudaEventRecord", 1090, 1),
    event("user_annotation", "wait_for_result", 1350, 420),
    event("cuda_runtime", "cudaEventSynchronize", 1360, 400),
    event("user_annotation", "wait_for_result", 2350, 120),
    event("cuda_runtime", "cudaEventSynchronize", 2360, 100),
    event("cuda_runtime", "cudaStreamSynchronize", 2900, 30),
    event("cuda_runtime", "cudaDeviceSynchronize", 3100, 9000),  # the profiler's own, at the end
]
NO_EVENTS = [{"ph": "M", "name": "process_name", "pid": 1}, {"ph": "i", "name": "Iteration Start", "ts": 0}]


def test_a_trace_of_a_gpu():
    summary = summarize_decode([*NO_EVENTS, *reversed(CALLS), *WORK, *PASSES], num_passes=2)
    assert (summary.batch_size, summary.num_passes, summary.pass_ms) == (4, 2, 1.0)
    assert summary.has_gpu and summary.cpu_ops == []
    assert summary.gpu_busy == pytest.approx((300 + 550 + 10 + 5 + 1000) / 2000)
    assert summary.largest_gap_us == 100
    assert summary.result_waits == [Calls("cudaEventSynchronize", per_pass=1.0, mean_us=250, max_us=400)]
    assert summary.other_waits == [Calls("cudaStreamSynchronize", per_pass=0.5, mean_us=30, max_us=30)]
    assert (summary.kernel_launches, summary.graph_launches, summary.launch_us) == (1.5, 1.0, 70)
    gemv, attention = summary.kernels
    assert gemv == Share("gemv", us_per_pass=900, share=pytest.approx(1800 / 1950))
    assert attention == Share("attention", us_per_pass=75, share=pytest.approx(150 / 1950))


def test_an_idle_end_is_a_gap():
    summary = summarize_decode([*passes("decode", 1, 0, 1000), event("kernel", "k", 100, 200)], 5)
    assert summary.num_passes == 1 and summary.gpu_busy == 0.2 and summary.largest_gap_us == 700


@pytest.mark.parametrize(
    ("name", "dur", "copy", "waits"),
    [
        ("cudaDeviceSynchronize", 1, None, True),
        ("cuStreamSynchronize", 1, None, True),
        ("cudaMemcpy", 1, None, True),
        ("cuMemcpyDtoH_v2", 1, None, True),
        ("cudaMalloc", 1, None, True),
        ("cudaHostAlloc", 1, None, True),
        ("cudaMemcpyAsync", 1, "Memcpy DtoH (Device -> Pageable)", True),
        ("cudaMemcpyAsync", 1, "Memcpy DtoH (Device -> Pinned)", False),
        ("cudaMemcpyAsync", 1, "Memcpy HtoD (Pinned -> Device)", False),
        ("cudaMemcpyAsync", 1, None, False),
        ("cudaMallocAsync", 1, None, False),
        ("cudaLaunchKernel", 90, None, False),
        ("cudaLaunchKernel", 1500, None, True),  # the queue was full
        ("cudaStreamWaitEvent", 1, None, False),
    ],
)
def test_which_calls_wait(name, dur, copy, waits):
    events = [*passes("decode", 1, 0, 1000), event("cuda_runtime", name, 10, dur, correlation=3)]
    if copy is not None:
        events.append(event("gpu_memcpy", copy, 20, 5, correlation=3))
    found = summarize_decode(events, 1)
    assert [wait.name for wait in found.other_waits] == ([f"{name}, {copy}" if copy else name] if waits else [])
    assert found.result_waits == []


def test_a_trace_of_a_cpu_gives_each_operation_its_own_time():
    ops = [
        event("cpu_op", "linear", 0, 100),
        event("cpu_op", "mm", 10, 80),
        event("cpu_op", "empty", 20, 5),
        event("cpu_op", "add", 100, 60),
        event("cpu_op", "mm", 50, 40, tid=2),  # beside the others
        event("cpu_op", "mm", 1500, 40),  # after the passes
    ]
    summary = summarize_decode([*passes("decode", 1, 0, 1000), *ops], 1)
    assert not summary.has_gpu and summary.kernels == []
    assert {op.name: op.us_per_pass for op in summary.cpu_ops} == {"mm": 115, "add": 60, "linear": 20, "empty": 5}
    assert [op.name for op in summary.cpu_ops] == ["mm", "add", "linear", "empty"]
    assert summary.cpu_ops[0].share == pytest.approx(115 / 200)


@pytest.mark.parametrize("events", [[], passes("decode", 1, 0), [*passes("decode", 1, 0), *passes("decode", 2, 1)]])
def test_a_trace_without_two_passes_in_a_row(events):
    with pytest.raises(ValueError, match="no two decode passes"):
        summarize_decode(events, 1)
