"""How fast each source fills an arena, beside the plainest way to move the same bytes into equally fresh memory.

    python benchmark/bench_weights.py [--rounds 5] [--size-mb 1024]

A seed process holds the weights; this process is the client. Every round measures everything once, one after the other,
so that the machine's moods hit all of them; ratios are medians of the rounds' ratios. "Fresh" memory has never been
touched: its first touch costs more than the copy itself. "Plain memcpy" is memmove with as many threads as the
source has; the bare Mooncake loop reads 64 MiB at a time.
"""
# ruff: noqa: E402 - the seed process is in the tests' folder, which has to be made importable first

import argparse
import ctypes
import functools
import mmap
import os
import re
import sys
import tempfile
import threading
from pathlib import Path
from statistics import median
from typing import Any

from bench_common import ROOT, read_weights, report, timed
from ramet.srt.model_loader.arena.allocate import allocate_arena

sys.path.insert(0, str(ROOT / "test"))

import numpy as np
import seed_process
from ramet.srt.configs.load_config import LoadConfig
from ramet.srt.model_loader.arena.base import SharedFile, WeightArena
from ramet.srt.model_loader.checkpoint.source import CheckpointSource
from ramet.srt.model_loader.client.local import LocalSource
from ramet.srt.model_loader.client.open_sources import SeedSources
from ramet.srt.model_loader.client.seed_instance import SeedInstance
from ramet.srt.model_loader.client.transfer import SeedTransfer
from ramet.srt.model_loader.loader import get_model_loader
from ramet.srt.model_loader.remote_instance_weight_loader_utils import SeedServer, fetch_seed_answer
from ramet.srt.model_loader.transport.engine_messages import StartEngine
from ramet.srt.model_loader.transport.local_share import request_memory
from ramet.srt.model_loader.transport.mooncake_engine import MooncakeEngine
from ramet.srt.utils import host_memory
from ramet.srt.utils.net import SeedAddress
from ramet.srt.utils.threads import num_copy_threads
from ramet.srt.weights.manifest import layout_digest
from ramet.srt.weights.registration import SeedAnswer
from safetensors.numpy import save_file

NUM_TENSORS = 64
LOOP_BYTES = 64 << 20
TIMEOUT_S = 60.0


def status_nbytes(path: str, key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB", Path(path).read_text(), re.M)
    assert found, f"{path} has no {key}"
    return int(found[1]) * 1024


@functools.cache
def _bare_engine() -> Any:
    """Mooncake's own engine in this process."""
    return MooncakeEngine(StartEngine("127.0.0.1", "127.0.0.1", "tcp", ""))._engine


class FreshMemory:
    """A shared-memory file that nobody has touched, as an arena's is."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.fd = host_memory.create_memfd("fresh", nbytes)
        self.address = host_memory.reserve_addresses(nbytes)
        host_memory.map_file_at(self.address, nbytes, self.fd, private=False)

    def __enter__(self) -> "FreshMemory":
        return self

    def __exit__(self, *_: object) -> None:
        host_memory.unmap(self.address, self.nbytes)
        os.close(self.fd)


def memcpy(target: int, source: int, nbytes: int) -> None:
    """Plain memmove of consecutive parts by as many threads as the sources use."""
    part = -(-nbytes // num_copy_threads())

    def copy(start: int) -> None:
        ctypes.memmove(target + start, source + start, min(part, nbytes - start))

    threads = [threading.Thread(target=copy, args=(start,)) for start in range(0, nbytes, part)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class Bench:
    """The seed, the files, and one method per measurement; each returns seconds."""

    def __init__(self, seed: seed_process.SeedProcess, folder: Path) -> None:
        self.seed = seed
        self.folder = folder
        self.manifest = seed_process.make_manifest(seed.config)
        self.nbytes = self.manifest.arena_nbytes
        self.answer: SeedAnswer = fetch_seed_answer(
            SeedServer(SeedAddress("127.0.0.1", seed.port)), 0, "target", TIMEOUT_S
        )
        tensors = seed_process.make_tensors(seed.config)
        shapes = seed.config["shapes"]
        save_file(
            {name: tensor.view(np.float32).reshape(shapes[name]) for name, tensor in tensors.items()},
            folder / "model.safetensors",
        )
        assert self.answer.local_handle
        name = self.answer.local_handle.socket_name
        self.seed_memory = request_memory(name, layout_digest(self.manifest), TIMEOUT_S)
        assert isinstance(self.seed_memory.share, SharedFile)
        self.seed_view = mmap.mmap(self.seed_memory.share.fd, self.nbytes, mmap.MAP_SHARED, mmap.PROT_READ)
        self.seed_address = np.frombuffer(self.seed_view, np.uint8).ctypes.data

    def arena(self) -> WeightArena:
        return allocate_arena(self.manifest, "cpu")

    def memcpy_from_seed(self) -> float:
        np.frombuffer(self.seed_view, np.uint8)[:: mmap.PAGESIZE].sum()  # map the source's pages
        with FreshMemory(self.arena().nbytes) as target:
            return timed(lambda: memcpy(target.address, self.seed_address, self.nbytes))

    def transfer(self, local_mode: str) -> float:
        """What moves the bytes in a load: plan, window, transport; without asking the seed and without checksums."""
        arena = self.arena()
        config = LoadConfig(local_mode=local_mode, timeout_s=TIMEOUT_S)
        seed = SeedInstance(SeedAddress("127.0.0.1", self.seed.port), config, self.manifest)
        seed.find_ranks()
        return timed(SeedTransfer(arena, [seed], lambda: SeedSources(arena, config)).run)

    def local_map(self) -> tuple[float, float]:
        """Seconds, and the extra memory as a share of the model once every byte has been read."""
        arena = self.arena()
        pss, dirty = (status_nbytes("/proc/self/smaps_rollup", key) for key in ("Pss", "Private_Dirty"))
        assert self.answer.manifest and self.answer.local_handle
        with LocalSource(self.answer.manifest, self.answer.local_handle, arena, TIMEOUT_S) as source:
            seconds = timed(source.map)
        np.frombuffer(arena.memory, np.uint8).max()
        # Shared pages are counted where they are already: only private ones are new.
        extra = status_nbytes("/proc/self/smaps_rollup", "Private_Dirty") - dirty
        assert status_nbytes("/proc/self/smaps_rollup", "Pss") > pss
        return seconds, max(0, extra) / self.nbytes

    def memcpy_from_file(self) -> float:
        read_weights(self.folder)
        with (self.folder / "model.safetensors").open("rb") as file:
            view = mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ)
            pages = np.frombuffer(view, np.uint8)
            pages[:: mmap.PAGESIZE].sum()  # map the source's pages
            offset = len(pages) - self.manifest.payload_nbytes
            with FreshMemory(self.arena().nbytes) as target:
                return timed(lambda: memcpy(target.address, pages.ctypes.data + offset, self.manifest.payload_nbytes))

    def checkpoint(self) -> tuple[float, float]:
        """Seconds, and the peak of memory during the load as a share of the model."""
        read_weights(self.folder)
        arena = self.arena()
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak
        before = status_nbytes("/proc/self/status", "VmRSS")

        def load() -> None:
            source = CheckpointSource(str(self.folder))
            source.fill(source.plan(self.manifest), arena)

        seconds = timed(load)
        return seconds, (status_nbytes("/proc/self/status", "VmHWM") - before) / self.nbytes

    def mooncake_loop(self, touched: bool) -> float:
        """A bare loop of batch_transfer_sync_read over the same bytes, registration included."""
        engine = _bare_engine()
        base = self.answer.arena_address
        assert base is not None
        with FreshMemory(self.arena().nbytes) as target:
            if touched:
                ctypes.memset(target.address, 1, target.nbytes)

            def loop() -> None:
                assert engine.register_memory(target.address, target.nbytes) == 0
                for start in range(0, self.nbytes, LOOP_BYTES):
                    length = min(LOOP_BYTES, self.nbytes - start)
                    addresses = [target.address + start], [base + start]
                    assert engine.batch_transfer_sync_read(self.answer.session_id, *addresses, [length]) == 0
                engine.unregister_memory(target.address)

            return timed(loop)

    def whole_load(self, local_mode: str) -> float:
        """What a starting instance does: ask the seed, compare, fill, verify the checksums."""
        arena = self.arena()
        config = LoadConfig(
            load_format="remote_instance",
            seeds=(SeedAddress("127.0.0.1", self.seed.port),),
            local_mode=local_mode,
            fallback="error",
        )
        return timed(lambda: get_model_loader(config).load_weights(self.manifest, arena, ""))


def measure_round(bench: Bench) -> dict[str, float]:
    map_s, map_extra = bench.local_map()
    checkpoint_s, checkpoint_peak = bench.checkpoint()
    return {
        "memcpy_from_seed": bench.memcpy_from_seed(),
        "local_copy": bench.transfer("copy"),
        "local_map": map_s,
        "local_map_extra": map_extra,
        "memcpy_from_file": bench.memcpy_from_file(),
        "checkpoint": checkpoint_s,
        "checkpoint_peak": checkpoint_peak,
        "mooncake_loop_fresh": bench.mooncake_loop(touched=False),
        "mooncake_loop_touched": bench.mooncake_loop(touched=True),
        "transfer_engine": bench.transfer("off"),
        "load_map": bench.whole_load("map"),
        "load_copy": bench.whole_load("copy"),
        "load_transfer_engine": bench.whole_load("off"),
    }


def make_rows(rounds: list[dict[str, float]], nbytes: int) -> list[tuple[str, str]]:
    def middle(name: str) -> float:
        return median([r[name] for r in rounds])

    def speed(name: str) -> str:
        return f"{nbytes / middle(name) / 1e9:.2f} GB/s"

    def ratio(name: str, plain: str) -> str:
        return f"{median([r[plain] / r[name] for r in rounds]):.2f} x"

    return [
        ("plain memcpy from the seed's memory into fresh memory", speed("memcpy_from_seed")),
        ("local, copy", f"{speed('local_copy')}, {ratio('local_copy', 'memcpy_from_seed')} of that"),
        ("local, map", f"{middle('local_map') * 1e3:.2f} ms, {middle('local_map_extra'):.1%} extra memory once read"),
        ("plain memcpy from the page cache into fresh memory", speed("memcpy_from_file")),
        (
            "checkpoint, warm page cache",
            f"{speed('checkpoint')}, {ratio('checkpoint', 'memcpy_from_file')} of that; "
            f"peak memory {middle('checkpoint_peak'):.2f} x the model",
        ),
        ("bare Mooncake loop into fresh memory", speed("mooncake_loop_fresh")),
        ("bare Mooncake loop into touched memory", speed("mooncake_loop_touched")),
        (
            "transfer_engine",
            f"{speed('transfer_engine')}, {ratio('transfer_engine', 'mooncake_loop_fresh')} of the first, "
            f"{ratio('transfer_engine', 'mooncake_loop_touched')} of the second",
        ),
        ("whole load with checks, map", f"{middle('load_map') * 1e3:.0f} ms"),
        ("whole load with checks, copy", f"{middle('load_copy'):.2f} s"),
        ("whole load with checks, transfer_engine", f"{middle('load_transfer_engine'):.2f} s"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size-mb", type=int, default=1024, help="size of the model in MiB")
    parser.add_argument("--output", type=Path, help="file for the result as JSON")
    args = parser.parse_args()
    rows_of_each = args.size_mb * (1 << 20) // NUM_TENSORS // 4096
    shapes = {f"w{i}": [rows_of_each, 1024] for i in range(NUM_TENSORS)}
    with tempfile.TemporaryDirectory(prefix="ramet-bench-") as folder, seed_process.SeedProcess(shapes=shapes) as seed:
        bench = Bench(seed, Path(folder))
        measure_round(bench)  # imports, connections and the machine's memory are warm after it
        rounds = [measure_round(bench) for _ in range(args.rounds)]
        rows = make_rows(rounds, bench.nbytes)
        report(
            f"Weights: {bench.nbytes / 1e9:.2f} GB, {num_copy_threads()} threads",
            args.output,
            rows,
            {"nbytes": bench.nbytes, "threads": num_copy_threads(), "rounds": rounds},
        )


if __name__ == "__main__":
    main()
