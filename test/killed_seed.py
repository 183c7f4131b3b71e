"""Owns a clone whose seed is killed while its memory is being copied, on any device; the clone has a real engine."""

import contextlib
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import random_models as rm
from engine_harness import EngineHarness
from ramet.srt.model_loader.client.local import LocalSource
from server_process import is_running

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmark"))
from bench_common import Server  # noqa: E402 - its folder is made importable above
from soak_clones import process_tree  # noqa: E402 - its folder is made importable above

OFFER = "--remote-instance-weight-loader-start-seed-via-transfer-engine"
PREFIX = "remote_instance_weight_loader"
PROMPTS = rm.random_prompts([5, 33])
NUM_TOKENS = 12
HELD_BACK_CYCLES = 2_000_000_000  # about a second of a GPU
DEATH_TIMEOUT_S = 30.0


def answers_of(server: Server) -> list[list[int]]:
    sampling = {"temperature": 0, "max_new_tokens": NUM_TOKENS, "ignore_eos": True}
    outputs = server.call("/generate", {"input_ids": PROMPTS, "sampling_params": sampling})
    return [output["output_ids"] for output in outputs]


def kill_instance(server: Server) -> None:
    """SIGKILL for all its processes, and wait until the last one has let go of everything."""
    processes = process_tree(server.process.pid)
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    server.process.wait(DEATH_TIMEOUT_S)
    deadline = time.monotonic() + DEATH_TIMEOUT_S
    while any(is_running(process) for process in processes):
        assert time.monotonic() < deadline, "the seed does not die"
        time.sleep(0.01)


def interrupt_first_copy(monkeypatch, device: str, interrupt: Callable[[int], None]) -> None:
    """Call `interrupt` with the process that the first local copy is from, while it is under way.

    On a GPU the copy has been queued then, and is held back for a second.
    """
    run, pending = LocalSource.run, [True]

    def run_interrupted(source: LocalSource, step: list) -> None:
        if not pending:
            return run(source, step)
        pending.pop()
        process, _, _ = struct.unpack(
            "3i", source._memory._connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        )
        if device == "cpu":
            interrupt(process)
            return run(source, step)
        with _held_back_copies(monkeypatch, lambda: interrupt(process)):
            return run(source, step)

    monkeypatch.setattr(LocalSource, "run", run_interrupted)


@contextlib.contextmanager
def _held_back_copies(monkeypatch, when_queued: Callable[[], None]) -> Iterator[None]:
    import torch
    from ramet.srt.model_loader.arena import cuda_copies

    queue = cuda_copies.queue_copies

    def queue_held_back(ops, source, target, stream) -> None:
        with torch.cuda.stream(torch.cuda.ExternalStream(stream)):
            torch.cuda._sleep(HELD_BACK_CYCLES)
        queue(ops, source, target, stream)
        when_queued()

    with monkeypatch.context() as patch:
        patch.setattr(cuda_copies, "queue_copies", queue_held_back)
        yield


@contextlib.contextmanager
def seeds(folder: Path, device: str, count: int, *flags: str) -> Iterator[list[Server]]:
    """Running instances, ended however they are."""
    common = ["--device", device, "--max-total-tokens", "4096", "--max-running-requests", "8"]
    servers: list[Server] = []
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            servers.append(Server(folder, *common, OFFER, *flags))
            stack.callback(servers[-1].stop)
        yield servers


def clone_while_one_dies(monkeypatch, folder: Path, device: str, servers: list[Server]) -> EngineHarness:
    """A clone of these instances, in this process; the one that it copies from is killed while it does."""

    def kill(process: int) -> None:
        kill_instance(next(server for server in servers if process in process_tree(server.process.pid)))

    interrupt_first_copy(monkeypatch, device, kill)
    addresses = ",".join(f"127.0.0.1:{server.port}" for server in servers)
    options = {f"{PREFIX}_seed_instance_ip": addresses, f"{PREFIX}_local_mode": "copy", f"{PREFIX}_timeout": 20.0}
    clone = EngineHarness(folder, device=device, load_format="remote_instance", **options)
    assert sum(server.process.poll() is not None for server in servers) == 1, "none was killed"
    return clone


def tokens_of(engine: EngineHarness) -> list[list[int]]:
    return [result.token_ids for result in engine.generate(PROMPTS, max_new_tokens=NUM_TOKENS)]
