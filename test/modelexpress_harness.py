"""Starts metadata servers and Redis for the ModelExpress tests, and makes records for them."""

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.modelexpress.ages import wall_clock_ms
from ramet.srt.modelexpress.client.client import ModelExpressClient
from ramet.srt.modelexpress.proto import p2p_pb2
from ramet.srt.modelexpress.records import InstanceFacts, build_worker_metadata
from ramet.srt.modelexpress.server.server import ModelExpressServer, ServerOptions
from ramet.srt.modelexpress.source_identity import EngineValues, build_source_identity
from ramet.srt.weights.manifest import WeightBox, WeightEntry, WeightManifest


def wait_until(condition: Callable[[], Any], timeout_s: float = 15.0, what: str = "the condition") -> Any:
    """The first true value of `condition`; the test fails if there is none in time."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"{what} did not come true within {timeout_s} s")
        time.sleep(0.02)
    return value


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def running_server(**options: Any) -> Iterator[ModelExpressServer]:
    """A server on free ports, in this process."""
    server = ModelExpressServer(ServerOptions(**{"port": 0, "metrics_port": 0} | options))
    server.start()
    try:
        yield server
    finally:
        server.close(grace_s=0.5)


@pytest.fixture
def server() -> Iterator[ModelExpressServer]:
    """A server; a test file may have another one in its place."""
    with running_server() as running:
        yield running


def open_client(address: str) -> ModelExpressClient:
    """A client that this process's environment does not change."""
    return ModelExpressClient(address, environ={})


@pytest.fixture
def client(server: ModelExpressServer) -> Iterator[ModelExpressClient]:
    with open_client(server.address) as made:
        yield made


class RedisProcess:
    """A redis-server that keeps every acknowledged write on disk, on a port of its own."""

    def __init__(self, folder: Path):
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._folder = folder
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self._folder)]
        command += ["--appendonly", "yes", "--appendfsync", "always", "--save", ""]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_until(self._answers, what="redis-server answering")

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(16).startswith(b"+PONG")
        return False

    def kill(self) -> None:
        """End it the hard way."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)
            self.process = None


@contextlib.contextmanager
def running_redis(folder: Path) -> Iterator[RedisProcess]:
    if shutil.which("redis-server") is None:
        pytest.skip("needs redis-server")
    redis = RedisProcess(folder)
    redis.start()
    try:
        yield redis
    finally:
        redis.kill()


def make_identity(model_name: str = "org/model", **engine: Any) -> p2p_pb2.SourceIdentity:
    values = EngineValues(model_name=model_name, **{"dtype": "bfloat16"} | engine)
    return build_source_identity(values)


def make_manifest(num_tensors: int = 3, **parallel: int) -> WeightManifest:
    """Consecutive bfloat16 tensors of 128 bytes in 256-byte slots."""
    entries = tuple(
        WeightEntry(
            name=f"model.layers.{index}.mlp.down_proj.weight",
            dtype="bfloat16",
            shape=(8, 8),
            offset=256 * index,
            nbytes=128,
            boxes=(WeightBox(f"layers.{index}", ((0, 8), (0, 8)), ((0, 8), (0, 8))),),
        )
        for index in range(num_tensors)
    )
    return WeightManifest(
        model_name="org/model",
        revision="",
        dtype="bfloat16",
        quantization="",
        role="target",
        parallel=ParallelConfig(**parallel),
        arena_nbytes=256 * num_tensors,
        entries=entries,
    )


def make_worker(
    num_tensors: int = 3, status: int = p2p_pb2.SOURCE_STATUS_READY, age_s: float = 0.0, **facts: Any
) -> p2p_pb2.WorkerMetadata:
    """A record as this engine's publisher makes it, written `age_s` ago."""
    worker = build_worker_metadata(
        make_manifest(num_tensors),
        base_address=1 << 40,
        session_id="127.0.0.1:12345",
        info_url="http://127.0.0.1:30000/remote_instance_transfer_engine_info?rank=0&role=target",
        facts=InstanceFacts(**{"instance": "http://127.0.0.1:30000"} | facts),
    )
    worker.status = status
    worker.updated_at = wall_clock_ms() - round(age_s * 1000)
    return worker
