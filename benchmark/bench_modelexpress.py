"""The metadata server with many workers: calls per second, their 99th percentile, and its memory per worker.

    python benchmark/bench_modelexpress.py [--workers 1000] [--tensors 3000] [--ranks 8] [--seconds 5]

The workers are the ranks of instances of one model. One process calls, --concurrency calls at a time; caller and
server share the machine. With records in memory, then in a redis-server of its own, where there is one.
"""

import argparse
import asyncio
import contextlib
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import grpc
import psutil
from bench_common import MetadataServer, free_port, report, running_metadata_server
from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.modelexpress.ages import wall_clock_ms
from ramet.srt.modelexpress.client.client import SERVICE
from ramet.srt.modelexpress.proto import p2p_pb2
from ramet.srt.modelexpress.records import InstanceFacts, build_worker_metadata
from ramet.srt.modelexpress.rpc import MESSAGE_SIZE_OPTIONS, client_calls
from ramet.srt.modelexpress.source_identity import EngineValues, build_source_identity, compute_source_id
from ramet.srt.weights.manifest import WeightEntry, WeightManifest
from ramet.srt.weights.report import LoadReport

READY = p2p_pb2.SOURCE_STATUS_READY
PARTS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj", "input_layernorm")


@contextlib.contextmanager
def running_redis(folder: Path) -> Iterator[tuple[str, psutil.Process]]:
    """A redis-server that keeps nothing on disk, and its URL."""
    port = free_port()
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 10
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            if time.monotonic() > deadline:
                raise RuntimeError("redis-server did not start")
            time.sleep(0.02)
        yield f"redis://127.0.0.1:{port}", psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(20)


def make_worker(rank: int, num_ranks: int, num_tensors: int) -> p2p_pb2.WorkerMetadata:
    """A rank's record as a publisher makes it, with names and sizes like a real model's."""
    entries = tuple(
        WeightEntry(
            name=f"model.layers.{index // len(PARTS)}.{PARTS[index % len(PARTS)]}.weight",
            dtype="bfloat16",
            shape=(4096, 1024 + index % 7),
            offset=index * (1 << 23),
            nbytes=4096 * (1024 + index % 7) * 2,
            boxes=(),
        )
        for index in range(num_tensors)
    )
    manifest = WeightManifest(
        model_name="org/model",
        revision="",
        dtype="bfloat16",
        quantization="",
        role="target",
        parallel=ParallelConfig(tp_size=num_ranks, tp_rank=rank),
        arena_nbytes=num_tensors << 23,
        entries=entries,
    )
    load = LoadReport(source="transfer_engine", num_bytes=1, seconds=1.0, verified=True, taken_from=("0" * 32,))
    return build_worker_metadata(
        manifest,
        base_address=(1 << 46) + (rank << 40),
        session_id="10.0.0.1:15000",
        info_url="http://10.0.0.1:30000/remote_instance_transfer_engine_info?rank=0&role=target",
        facts=InstanceFacts(instance="http://10.0.0.1:30000", host="node", world_rank=rank, load=load),
        accelerator="cuda",
    )


async def measure(
    calls: list[Callable[[], Awaitable[Any]]], process: psutil.Process, concurrency: int, seconds: float | None
) -> dict[str, Any]:
    """Make the calls, in turns, `concurrency` at a time: each once when `seconds` is None, else for so long.

    The server's CPU time per call does not depend on what else the machine does.
    """
    latencies: list[float] = []
    next_call = 0
    cpu_start_s = sum(process.cpu_times()[:2])
    start = time.perf_counter()

    async def worker() -> None:
        nonlocal next_call
        while next_call < len(calls) if seconds is None else time.perf_counter() - start < seconds:
            call = calls[next_call % len(calls)]
            next_call += 1
            began = time.perf_counter()
            await call()
            latencies.append(time.perf_counter() - began)

    await asyncio.gather(*(worker() for _ in range(concurrency)))
    elapsed = time.perf_counter() - start
    return {
        "calls_per_s": len(latencies) / elapsed,
        "median_ms": median(latencies) * 1e3,
        "p99_ms": quantiles(latencies, n=100)[98] * 1e3,
        "server_cpu_ms": (sum(process.cpu_times()[:2]) - cpu_start_s) / len(latencies) * 1e3,
    }


async def measure_server(server: MetadataServer, args: argparse.Namespace) -> dict[str, Any]:
    """Publish all workers, then measure each kind of call."""
    process = psutil.Process(server.pid)
    identity = build_source_identity(EngineValues(model_name="org/model", dtype="bfloat16", tp_size=args.ranks))
    source_id = compute_source_id(identity)
    records = [make_worker(rank, args.ranks, args.tensors) for rank in range(args.ranks)]
    ids = [f"{index:032x}" for index in range(args.workers)]
    results: dict[str, Any] = {"empty_rss": process.memory_info().rss}
    async with grpc.aio.insecure_channel(server.address, options=MESSAGE_SIZE_OPTIONS) as channel:
        raw = client_calls(channel, SERVICE)

        def publish(index: int) -> Awaitable[Any]:
            record = records[index % args.ranks]
            record.status, record.updated_at = READY, wall_clock_ms()
            request = p2p_pb2.PublishMetadataRequest(identity=identity, worker=record, worker_id=ids[index])
            return raw["PublishMetadata"](request, timeout=60)

        def update(index: int) -> Awaitable[Any]:
            request = p2p_pb2.UpdateStatusRequest(
                mx_source_id=source_id,
                worker_id=ids[index],
                worker_rank=index % args.ranks,
                status=READY,
                source_load=0.5,
            )
            return raw["UpdateStatus"](request, timeout=60)

        def get(index: int) -> Awaitable[Any]:
            request = p2p_pb2.GetMetadataRequest(mx_source_id=source_id, worker_id=ids[index])
            return raw["GetMetadata"](request, timeout=60)

        workers = range(args.workers)
        one_rank = p2p_pb2.ListSourcesRequest(identity=identity, status_filter=READY, worker_rank_filter=0)
        all_ranks = p2p_pb2.ListSourcesRequest(identity=identity, status_filter=READY)
        results["record_bytes"] = records[0].ByteSize()
        results["PublishMetadata"] = await measure(
            [lambda i=i: publish(i) for i in workers], process, args.concurrency, None
        )
        results["full_rss"] = process.memory_info().rss
        for name, calls in {
            "UpdateStatus": [lambda i=i: update(i) for i in workers],
            "ListSources, one rank": [lambda: raw["ListSources"](one_rank, timeout=60)],
            "ListSources, all ranks": [lambda: raw["ListSources"](all_ranks, timeout=60)],
            "GetMetadata": [lambda i=i: get(i) for i in workers],
            "GetMetadata, the same 8 workers": [lambda i=i: get(i) for i in workers[:8]],
        }.items():
            results[name] = await measure(calls, process, args.concurrency, args.seconds)
        listed = await raw["ListSources"](all_ranks, timeout=60)
        if len(listed.instances) != args.workers:
            raise RuntimeError(f"{len(listed.instances)} workers are listed, {args.workers} were published")
    return results


def to_rows(name: str, results: dict[str, Any], num_workers: int) -> list[tuple[str, str]]:
    rows = []
    for label, result in results.items():
        if isinstance(result, dict):
            text = f"{result['calls_per_s']:.0f} calls/s, median {result['median_ms']:.1f} ms"
            text += f", p99 {result['p99_ms']:.1f} ms, server CPU {result['server_cpu_ms']:.2f} ms"
            rows.append((f"{name}: {label}", text))
    per_worker = (results["full_rss"] - results["empty_rss"]) / num_workers
    rows.append((f"{name}: server memory per worker", f"{per_worker / 1e3:.1f} kB"))
    if "redis_bytes" in results:
        rows.append((f"{name}: redis memory per worker", f"{results['redis_bytes'] / num_workers / 1e3:.0f} kB"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--tensors", type=int, default=3000, help="per worker")
    parser.add_argument("--ranks", type=int, default=8, help="per instance")
    parser.add_argument("--seconds", type=float, default=5.0, help="per kind of call")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--output", type=Path, help="file for the result as JSON")
    args = parser.parse_args()
    values: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with running_metadata_server(folder) as server:
            values["memory"] = asyncio.run(measure_server(server, args))
        if shutil.which("redis-server"):
            with (
                running_redis(folder) as (url, redis),
                running_metadata_server(folder, "--redis-url", url) as server,
            ):
                empty = redis.memory_info().rss
                values["redis"] = asyncio.run(measure_server(server, args))
                values["redis"]["redis_bytes"] = redis.memory_info().rss - empty
    rows = [("a record", f"{args.tensors} tensors, {values['memory']['record_bytes'] / 1e3:.0f} kB on the wire")]
    for store, results in values.items():
        rows += to_rows(store, results, args.workers)
    report("modelexpress", args.output, rows, values)


if __name__ == "__main__":
    main()
