"""The fleet page with many instances: how long it takes to load in a browser, and what a refresh costs the server.

    python benchmark/bench_fleet_page.py [--instances 1000] [--refreshes 100] [--loads 10]

Instances beat as living ones do meanwhile. Loading is from the navigation until the totals, the first 50 instances
and the graph are drawn, by the page's own clock. Needs chromium; browser and server share the machine.
"""

import argparse
import asyncio
import contextlib
import random
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from bench_common import ROOT, MetadataServer, percentile, report, running_metadata_server
from ramet.srt.modelexpress.client.client import ModelExpressClient
from ramet.srt.modelexpress.client.publisher import READY
from ramet.srt.modelexpress.settings import LIVE_INTERVAL_S
from ramet.srt.weights.report import LoadReport

sys.path.insert(0, str(ROOT / "test"))
from browser import Tab, open_browser
from modelexpress_harness import make_identity, make_worker

MODEL_BYTES = 16_000_000_000
NUM_DRAWN = 50  # rows that the page draws at first
# Told by the page itself: when the last of what is waited for is there, and a frame later.
NOTE_LOADED = """
new MutationObserver((_, observer) => {
  if (document.querySelectorAll("tbody").length < %d || !document.querySelector(".bars li")) return;
  observer.disconnect();
  requestAnimationFrame(() => { window.loadedMs = performance.now(); });
}).observe(document, { childList: true, subtree: true });
"""


def publish(client: ModelExpressClient, num_instances: int) -> str:
    """A tree of clones: each instance has taken its weights from one before it, wave after wave."""
    identity, start, source_id = make_identity(), time.time() - 600, ""
    for index in range(num_instances):
        giver = f"{index // 2:032x}"
        load = LoadReport(
            source="transfer_engine" if index else "checkpoint",
            num_bytes=MODEL_BYTES,
            seconds=8.0,
            verified=bool(index),
            taken_from=(giver,) if index else (),
            taken_bytes=(MODEL_BYTES,) if index else (),
        )
        facts: dict[str, Any] = {
            "instance": f"http://10.{index >> 16}.{index >> 8 & 255}.{index & 255}:30000",
            "host": f"node-{index}",
            "started_at": start + index / 100,
            "loaded_at": start + 10 * index.bit_length(),
            "heartbeat_s": LIVE_INTERVAL_S,
        }
        worker = make_worker(load=load, **facts)
        source_id = client.publish(identity, f"{index:032x}", worker)
    return source_id


async def beat(client: ModelExpressClient, source_id: str, num_instances: int) -> None:
    """Renew each record once in an interval, as its instance would."""
    while True:
        for index in range(num_instances):
            load = random.random()
            await asyncio.to_thread(client.update_status, source_id, f"{index:032x}", 0, READY, load)
            await asyncio.sleep(LIVE_INTERVAL_S / num_instances / 2)


@contextlib.asynccontextmanager
async def beating(server: MetadataServer, source_id: str, num_instances: int) -> AsyncIterator[None]:
    with ModelExpressClient(server.address, environ={}) as client:
        task = asyncio.create_task(beat(client, source_id, num_instances))
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


def refresh(url: str) -> tuple[float, int]:
    """Seconds until the answer is there, and its bytes."""
    start = time.perf_counter()
    with urllib.request.urlopen(f"{url}/fleet.json", timeout=30) as answer:
        num_bytes = len(answer.read())
    return time.perf_counter() - start, num_bytes


def measure_refreshes(server: MetadataServer, num_refreshes: int) -> dict[str, Any]:
    """The server's processor time for one, whatever else the machine does, and the time of an answer."""
    process = psutil.Process(server.pid)
    refresh(server.http_url)
    cpu_start_s = sum(process.cpu_times()[:2])
    answers = [refresh(server.http_url) for _ in range(num_refreshes)]
    cpu_s = sum(process.cpu_times()[:2]) - cpu_start_s
    seconds = [one[0] for one in answers]
    return {
        "server_cpu_ms": 1e3 * cpu_s / num_refreshes,
        "median_ms": 1e3 * median(seconds),
        "p99_ms": 1e3 * percentile(seconds, 0.99),
        "bytes": answers[0][1],
    }


async def measure_loads(tab: Tab, url: str, num_loads: int, num_rows: int) -> list[float]:
    """Milliseconds of each load."""
    await tab.send("Page.addScriptToEvaluateOnNewDocument", source=NOTE_LOADED % num_rows)
    found = []
    for _ in range(num_loads):
        await tab.open(url + "/")
        await tab.wait_for("window.loadedMs")
        found.append(await tab.evaluate("window.loadedMs"))
    return found


async def measure(server: MetadataServer, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    with ModelExpressClient(server.address, environ={}) as client:
        source_id = publish(client, args.instances)
    values: dict[str, Any] = {"refresh": await asyncio.to_thread(measure_refreshes, server, args.refreshes)}
    async with beating(server, source_id, args.instances), open_browser(folder / "profile") as tab:
        loads = await measure_loads(tab, server.http_url, args.loads, min(NUM_DRAWN, args.instances))
    return values | {"load_ms": loads}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=int, default=1000)
    parser.add_argument("--refreshes", type=int, default=100)
    parser.add_argument("--loads", type=int, default=10)
    parser.add_argument("--output", type=Path, help="file for the result as JSON")
    parser.add_argument("server_flags", nargs="*", help="after --: flags for the metadata server, such as --redis-url")
    args = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        running_metadata_server(Path(folder), *args.server_flags) as server,
    ):
        values = asyncio.run(measure(server, args, Path(folder)))
    one, loads = values["refresh"], values["load_ms"]
    rows = [
        (f"{args.instances} instances: load", f"median {median(loads):.0f} ms, worst {max(loads):.0f} ms"),
        ("refresh: server CPU", f"{one['server_cpu_ms']:.1f} ms"),
        (
            "refresh: answer",
            f"median {one['median_ms']:.1f} ms, p99 {one['p99_ms']:.1f} ms, {one['bytes'] / 1e3:.0f} kB",
        ),
    ]
    report("fleet_page", args.output, rows, values)


if __name__ == "__main__":
    main()
