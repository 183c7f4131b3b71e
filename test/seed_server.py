"""Owns a seed instance inside of a test: the arenas of all its ranks, their registrations, and its HTTP routes."""

import asyncio
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import msgspec
from ramet.srt.entrypoints.engine_info_bootstrap_server import EngineInfoBootstrapServer
from ramet.srt.managers.io_struct import WeightChecksumsReq, WeightControlError
from ramet.srt.managers.weight_control import ask_rank
from ramet.srt.model_loader.seed_registration import ChecksumsRequest
from ramet.srt.model_loader.weight_arena import WeightArena
from ramet.srt.model_loader.weight_seed import WeightSeed


class WeightRoutes(BaseHTTPRequestHandler):
    """The routes of an instance's HTTP port that concern its weights."""

    bootstrap: EngineInfoBootstrapServer
    asked: list[str]  # what has been asked for, in order
    hidden: frozenset[str] = frozenset()  # paths that this seed does not know

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        self.asked.append(f"rank {query.get('rank')}")
        self.reply(*self.bootstrap.answer(query.get("rank"), query.get("role")))

    def do_POST(self) -> None:
        path = urlsplit(self.path).path
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.asked.append(path)
        if path in self.hidden:
            self.reply(404, b"{}")
        else:
            self.reply(*answer_checksums(self.bootstrap, body))

    def reply(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


def answer_checksums(bootstrap: EngineInfoBootstrapServer, body: bytes) -> tuple[int, bytes]:
    """As /remote_instance_weight_checksums answers."""
    request = msgspec.json.decode(body, type=ChecksumsRequest)
    address = bootstrap.control_address(request.role, request.rank)
    if address is None:
        return 404, b"{}"
    reply = asyncio.run(ask_rank(address, WeightChecksumsReq(regions=request.regions), 30))
    if isinstance(reply, WeightControlError):
        return 400, reply.message.encode()
    return 200, msgspec.json.encode({"algorithm": reply.algorithm, "checksums": reply.checksums})


class SeedServer:
    """A seed whose ranks all live in this process. Use as a context manager."""

    def __init__(self, arenas: Sequence[WeightArena], hidden: Sequence[str] = ()) -> None:
        self.asked: list[str] = []
        self.arenas = arenas
        self.seeds = [WeightSeed.start(arena.manifest, arena, host="127.0.0.1") for arena in arenas]
        self.bootstrap = EngineInfoBootstrapServer("127.0.0.1", 0)
        for seed in self.seeds:
            seed.register(self.bootstrap.url, admin_api_key=None, timeout_s=10)
        routes = {"bootstrap": self.bootstrap, "asked": self.asked, "hidden": frozenset(hidden)}
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Routes", (WeightRoutes,), routes))
        self.port: int = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def __enter__(self) -> "SeedServer":
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        for seed in self.seeds:
            seed.close()
        self.bootstrap.close()
