"""Owns the tests of a whole instance that strangers get at: what listens where, what ends, and who notices changes."""

import re
import socket
import struct
from pathlib import Path

import httpx
import pytest
from modelexpress_harness import running_server
from ramet.srt.model_loader.transport.listening_address import listeners
from random_models import write_tokenizer
from seed_server import write_random_model
from server_process import ServerProcess, is_running, wait_until

QUESTION = {"text": "The quick brown", "sampling_params": {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}}
FLAGS = ["--engine-info-bootstrap-port", "0", "--max-total-tokens", "256", "--device", "cpu", "--tp-size", "2"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = write_random_model(tmp_path_factory.mktemp("model"), "llama2")
    write_tokenizer(folder)
    return folder


def descendants(pid: int) -> list[int]:
    threads = Path(f"/proc/{pid}/task").iterdir()
    children = [int(child) for thread in threads for child in (thread / "children").read_text().split()]
    return children + [pid for child in children for pid in descendants(child)]


def change_weights(pid: int) -> None:
    """What a network card or a debugger does: write to another process's memory, past every guard of its own."""
    ranges = Path(f"/proc/{pid}/maps").read_text().splitlines()
    arena = next(line for line in ranges if "memfd:ramet-weights" in line and " rw-s " in line)
    with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
        memory.seek(int(arena.split("-")[0], 16) + 100)
        memory.write(b"\1\2\3\4")


def test_a_seed_is_reached_on_its_host_alone_survives_and_notices(tmp_path, model):
    with running_server() as mx:
        config = f'{{"url": "{mx.address}", "source": true}}'
        flags = [*FLAGS, "--modelexpress-config", config, "--weights-check-interval", "0.5"]
        server = ServerProcess(model, tmp_path / "log", *flags, "--host", "127.0.0.1", fake=False).wait_ready()
        try:
            # A rank tells the metadata server just after the instance is ready.
            wait_until(lambda: states(mx) == ["READY", "READY"], "both ranks to be told of")
            processes = [server.process.pid, *descendants(server.process.pid)]
            names = [Path(f"/proc/{pid}/comm").read_text().strip() for pid in processes]
            assert names.count("ramet-transport") == 2
            found = {pid: listeners(pid) for pid in processes}
            assert sum(map(len, found.values())) > 6  # HTTP, bootstrap, two for each engine, gloo's
            assert {listener.address for pid in processes for listener in found[pid]} == {"127.0.0.1"}

            before = httpx.post(f"{server.url}/generate", json=QUESTION, timeout=30).json()["text"]
            ports = [int(port) for port in re.findall(r"weights as 127\.0\.0\.1:(\d+)", server.output)]
            for port in ports:
                with socket.create_connection(("127.0.0.1", port)) as connection:
                    connection.sendall(struct.pack("<Q", 2) + b"[]")
            wait_until(
                lambda: server.output.count("weights are read over the network again") == 2, "the next processes"
            )
            assert httpx.post(f"{server.url}/generate", json=QUESTION, timeout=30).json()["text"] == before

            schedulers = [pid for pid in descendants(server.process.pid) if "scheduler" in command(pid)]
            change_weights(schedulers[1])
            assert server.process.wait(30) != 0
            (line,) = [line for line in server.output.splitlines() if "changed in memory" in line]
            assert "CRITICAL" in line and "the instance can't go on" in line
            assert states(mx) == ["STALE", "STALE"]
            wait_until(lambda: not any(map(is_running, processes)), "the end of all of its processes")
        finally:
            server.kill()


def states(mx) -> list[str]:
    """Of every rank that a metadata server knows of."""
    fleet = httpx.get(f"{mx.http_url}/fleet.json").json()
    instances = [instance for model in fleet["models"] for instance in model["instances"]]
    return [worker["status"] for instance in instances for worker in instance["workers"]]


def command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
