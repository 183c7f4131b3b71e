"""Owns a seed instance inside of a test: the arenas of all its ranks, their registrations, and its HTTP routes."""

import json
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import random_models as rm
import sharded_models as sm
import toy_model as toy
import uvicorn
from fastapi import FastAPI, Request
from fp8_models import load_arena
from ramet.srt.configs.load_config import LoadConfig
from ramet.srt.entrypoints.engine_info_bootstrap_server import EngineInfoBootstrapServer
from ramet.srt.entrypoints.http.http_errors import install_error_handlers
from ramet.srt.entrypoints.routes.weights import make_weight_router
from ramet.srt.entrypoints.weight_doors import WeightDoors
from ramet.srt.model_loader.arena.allocate import allocate_arena
from ramet.srt.model_loader.arena.base import WeightArena
from ramet.srt.model_loader.loader import get_model_loader
from ramet.srt.model_loader.seed.weight_seed import WeightSeed
from ramet.srt.utils.net import SeedAddress
from ramet.srt.weights.manifest import WeightManifest
from ramet.srt.weights.report import LoadReport
from seed_process import ChildSeed
from starlette.responses import Response


def make_weight_app(bootstrap: EngineInfoBootstrapServer, asked: list[str], hidden: Sequence[str] = ()) -> FastAPI:
    """The routes of an instance's HTTP port that concern its weights.

    Args:
        asked: gets a line for each request.
        hidden: paths that this seed does not know.
    """
    app = FastAPI()
    install_error_handlers(app)

    @app.middleware("http")
    async def note(request: Request, call_next):
        rank = request.query_params.get("rank")
        asked.append(request.url.path if rank is None else f"rank {rank}")
        return Response(status_code=404) if request.url.path in hidden else await call_next(request)

    @app.get("/remote_instance_transfer_engine_info")
    @app.get("/get_remote_instance_transfer_engine_info")
    async def info(rank: str | None = None, role: str | None = None) -> Response:
        status, body = bootstrap.answer(rank, role)
        return Response(body, status)

    registration = bootstrap.get("target", 0) or {}
    parallel = registration.get("manifest", {}).get("parallel", {})
    sizes = SimpleNamespace(tp_size=parallel.get("tp_size", 1), pp_size=parallel.get("pp_size", 1))
    instance = SimpleNamespace(doors=WeightDoors(bootstrap, 0, is_listed=False), server_args=sizes)
    app.include_router(make_weight_router(instance))
    return app


class HttpThread:
    """An app on a free port of loopback, in a thread."""

    def __init__(self, app: FastAPI) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = listener.getsockname()[1]
        config = uvicorn.Config(app, lifespan="off", log_config=None, timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listener]}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)


class SeedServer:
    """A seed whose ranks all live in this process. Use as a context manager."""

    def __init__(self, arenas: Sequence[WeightArena], hidden: Sequence[str] = ()) -> None:
        self.asked: list[str] = []
        self.arenas = arenas
        self.seeds = [WeightSeed.start(arena.manifest, arena, host="127.0.0.1") for arena in arenas]
        self.bootstrap = EngineInfoBootstrapServer("127.0.0.1", 0)
        for seed in self.seeds:
            seed.register(self.bootstrap.url, admin_api_key=None, timeout_s=10)
        self._http = HttpThread(make_weight_app(self.bootstrap, self.asked, hidden))
        self.port = self._http.port

    def __enter__(self) -> "SeedServer":
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()
        for seed in self.seeds:
            seed.close()
        self.bootstrap.close()


class SeedServerProcess(ChildSeed):
    """A SeedServer in a process of its own: it has a whole topology of the model in `folder`, read from disk."""

    def __init__(self, folder: Path, sizes: dict[str, int]) -> None:
        super().__init__(__file__, str(folder), json.dumps(sizes))


def serve(folder: Path, sizes: dict[str, int]) -> None:
    """Be a seed until stdin ends. Prints its HTTP port when it is ready."""
    with SeedServer(load_all(folder, sizes)) as server:
        sys.stdout.write(f"{server.port}\n")
        sys.stdout.flush()
        sys.stdin.read()


def write_random_model(path: Path, family: str, **overrides: Any) -> Path:
    """Config and random weights, good for every topology of the model."""
    folder = rm.make_config(path, family, **overrides)
    whole = sm.build_model(folder, sm.ranks_of()[0])
    tensors = sm.random_checkpoint(sm.checkpoint_shapes([whole]))
    toy.save_checkpoint(folder, {name: tensor.to(whole.dtype) for name, tensor in tensors.items()})
    return folder


def load_all(folder: Path, sizes: dict[str, int], quantization: str | None = None) -> list[WeightArena]:
    """The arena of every rank of a topology, from disk."""
    models = (sm.build_model(folder, parallel, quantization) for parallel in sm.ranks_of(**sizes))
    return [load_arena(folder, model) for model in models]


def take(
    manifest: WeightManifest, *servers: Any, folder: str = "/nonexistent", **options: Any
) -> tuple[WeightArena, LoadReport]:
    """A rank's arena, from seeds.

    Args:
        options: of LoadConfig.
    """
    arena = allocate_arena(manifest, "cpu")
    config = {"timeout_s": 10.0, "fallback": "error"} | options
    seeds = tuple(SeedAddress("127.0.0.1", server.port) for server in servers)
    loader = get_model_loader(LoadConfig(load_format="remote_instance", seeds=seeds, **config))
    return arena, loader.load_weights(manifest, arena, str(folder)).report


if __name__ == "__main__":
    serve(Path(sys.argv[1]), json.loads(sys.argv[2]))
