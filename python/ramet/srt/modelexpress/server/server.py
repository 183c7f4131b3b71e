"""Owns the running metadata server: its ports, its thread, its start and its stop. What it answers is service.py."""

import asyncio
import contextlib
import logging
import socket
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import grpc
import uvicorn

from ramet.srt.modelexpress.proto import health_pb2, p2p_pb2
from ramet.srt.modelexpress.rpc import MESSAGE_SIZE_OPTIONS
from ramet.srt.modelexpress.server.auth import TokenInterceptor
from ramet.srt.modelexpress.server.fleet import Fleet
from ramet.srt.modelexpress.server.fleet_app import make_fleet_app
from ramet.srt.modelexpress.server.fleet_service import FleetService
from ramet.srt.modelexpress.server.health import HealthService
from ramet.srt.modelexpress.server.intake import Intake, server_handler
from ramet.srt.modelexpress.server.load_history import LoadHistory
from ramet.srt.modelexpress.server.reaper import Reaper
from ramet.srt.modelexpress.server.row_ages import RowAges
from ramet.srt.modelexpress.server.server_metrics import ServerMetrics
from ramet.srt.modelexpress.server.service import P2pService
from ramet.srt.modelexpress.server.store import MemoryStore, MetadataStore
from ramet.srt.modelexpress.settings import HEARTBEAT_INTERVAL_S, INTERVAL_VARIABLE, env_seconds
from ramet.srt.modelexpress.tokens import TokenFile
from ramet.srt.utils import net
from ramet.srt.utils.http_guard import HttpLimits, guarded_protocol
from ramet.srt.utils.net import format_address, is_loopback

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 30.0
HTTP_LIMITS = HttpLimits(max_connections=512)
MIN_KEEPALIVE_PING_MS = 10_000
HANDSHAKE_TIMEOUT_MS = 10_000  # for a connection to speak HTTP/2
MAX_CONCURRENT_CALLS = 4096  # most of which wait; what comes above is refused, and tried again
PACKING_THREADS = 2
MIN_HEARTBEATS = 3  # that fit into the time after which a silent worker is stale


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """How a metadata server runs. A duration that is None comes from the environment, or is the reference server's."""

    host: str = "127.0.0.1"
    port: int = 8001  # gRPC; 0 takes a free one
    metrics_port: int = 8002  # HTTP: the fleet page, /fleet.json, /metrics, /health; 0 takes a free one
    redis_url: str | None = None
    auth_token_file: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    reaper_scan_interval: float | None = None  # seconds; MX_REAPER_SCAN_INTERVAL_SECS, else 30
    heartbeat_timeout: float | None = None  # seconds; MX_HEARTBEAT_TIMEOUT_SECS, else 90
    gc_timeout: float | None = None  # seconds; MX_GC_TIMEOUT_SECS, else 3600

    def __post_init__(self) -> None:
        for name in ("port", "metrics_port"):
            if not 0 <= getattr(self, name) <= 65535:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} must be a port number from 0 to 65535; got {getattr(self, name)}")
        for name in ("reaper_scan_interval", "heartbeat_timeout", "gc_timeout"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"--{name.replace('_', '-')} must be above 0; got {value}")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("--tls-cert and --tls-key are needed together")


class ModelExpressServer:
    """A metadata server in a thread of its own: `start` returns when it answers, `close` when it has ended.

    After the start, `address` is the host:port of gRPC and `http_url` that of the fleet page.
    """

    def __init__(self, options: ServerOptions):
        """
        Raises:
            ValueError: if a file cannot be read, or the Redis URL or an environment variable is malformed.
        """
        self.options = options
        self.metrics = ServerMetrics()
        self.address = ""
        self.http_url = ""
        self._tokens = TokenFile(options.auth_token_file) if options.auth_token_file else None
        self._credentials = read_credentials(options)
        self._interval_s = options.reaper_scan_interval or env_seconds("MX_REAPER_SCAN_INTERVAL_SECS", 30)
        self._heartbeat_timeout_s = options.heartbeat_timeout or env_seconds("MX_HEARTBEAT_TIMEOUT_SECS", 90)
        self._gc_timeout_s = options.gc_timeout or env_seconds("MX_GC_TIMEOUT_SECS", 3600)
        self._warn_of_few_heartbeats()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._grace_s = 0.0
        self._started: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="modelexpress-server", daemon=True)

    def start(self) -> None:
        """Bind the ports and serve.

        Raises:
            ValueError: if a port cannot be bound, or a certificate is not one. The message names the flag.
        """
        self._thread.start()
        self._started.result(timeout=START_TIMEOUT_S)

    def close(self, grace_s: float = 5.0) -> None:
        """Refuse new calls, give those that run `grace_s` to end, and free the ports. Idempotent."""
        if self._loop is not None and self._stop is not None and self._thread.is_alive():
            self._grace_s = grace_s
            with contextlib.suppress(RuntimeError):  # the loop has ended in this moment
                self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(timeout=grace_s + 10)

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def _warn_of_few_heartbeats(self) -> None:
        interval_s = env_seconds(INTERVAL_VARIABLE, HEARTBEAT_INTERVAL_S)
        if (num_beats := int(self._heartbeat_timeout_s // interval_s)) < MIN_HEARTBEATS:
            logger.warning(
                "a heartbeat timeout of %g s leaves time for %d heartbeats of an instance, which come every %g s "
                "(%s): a living one may vanish when one is late; --heartbeat-timeout should be at least %g",
                self._heartbeat_timeout_s,
                num_beats,
                interval_s,
                INTERVAL_VARIABLE,
                MIN_HEARTBEATS * interval_s,
            )

    def _warn_of_strangers(self) -> None:
        if self._tokens is None and not is_loopback(self.options.host):
            logger.warning(
                "THE MODELEXPRESS SERVER AT %s IS OPEN TO STRANGERS: it listens beyond this host and asks for no "
                "token, so whoever reaches it can publish weights under any model's name, which instances then take. "
                "Set --auth-token-file (MX_AUTH_TOKEN_PATH for an embedded server), or give instances --weights-digest",
                self.address,
            )

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:  # whatever loop the process prefers
                runner.run(self._serve())
        except BaseException as error:
            if self._started.done():
                logger.exception("the ModelExpress server has ended")
            else:
                self._started.set_exception(error)

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        # Large records are packed in threads, each of which keeps the memory that the largest one took.
        self._loop.set_default_executor(ThreadPoolExecutor(PACKING_THREADS, "modelexpress-pack"))
        store, targets = self._make_store(), FleetService()
        ages, health, history = RowAges(), HealthService(), LoadHistory()
        records = P2pService(store, ages, history, self.metrics, self._heartbeat_timeout_s)
        grpc_server = self._make_grpc_server(records, health, targets)
        port = bind_grpc(grpc_server, self.options, self._credentials)
        with bind_http(self.options) as http_socket:
            fleet = Fleet(store, ages, history, self._heartbeat_timeout_s, targets.describe)
            http = self._make_http_server(fleet, targets)
            reaper = Reaper(store, ages, self.metrics, self._heartbeat_timeout_s, self._gc_timeout_s)
            await grpc_server.start()
            reaping = asyncio.create_task(reaper.run(self._interval_s, self._stop))
            serving = asyncio.create_task(http.serve([http_socket]))
            self.address = format_address(self.options.host, port)
            scheme = "https" if self.options.tls_cert else "http"
            self.http_url = f"{scheme}://{format_address(self.options.host, http_socket.getsockname()[1])}"
            logger.info(
                "ModelExpress server: gRPC on %s, fleet page on %s/, records in %s",
                self.address,
                self.http_url,
                store.name,
            )
            self._warn_of_strangers()
            self._started.set_result(None)
            await self._stop.wait()
            health.stop_serving()
            http.should_exit = True
            await grpc_server.stop(self._grace_s)
            await asyncio.wait((reaping, serving), timeout=self._grace_s)
        await store.close()

    def _make_grpc_server(self, service: P2pService, health: HealthService, targets: FleetService) -> grpc.aio.Server:
        server = grpc.aio.server(
            interceptors=[TokenInterceptor(self._tokens, self.metrics)] if self._tokens else [],
            options=[
                *MESSAGE_SIZE_OPTIONS,
                ("grpc.so_reuseport", 0),  # a second server on this port is an error, not a secret sharer
                ("grpc.http2.min_ping_interval_without_data_ms", MIN_KEEPALIVE_PING_MS),
                ("grpc.server_handshake_timeout_ms", HANDSHAKE_TIMEOUT_MS),
            ],
            maximum_concurrent_rpcs=MAX_CONCURRENT_CALLS,
        )
        intake = Intake()
        server.add_generic_rpc_handlers(
            (
                server_handler(p2p_pb2.DESCRIPTOR.services_by_name["P2pService"], service, intake),
                server_handler(health_pb2.DESCRIPTOR.services_by_name["Health"], health, intake),
                targets.handler(intake),
            )
        )
        return server

    def _make_http_server(self, fleet: Fleet, targets: FleetService) -> uvicorn.Server:
        config = uvicorn.Config(
            make_fleet_app(fleet, self.metrics, self._tokens, targets.routes(self.options.host, self._tokens)),
            http=guarded_protocol(HTTP_LIMITS, "/health".__eq__),
            ws="none",
            log_config=None,
            access_log=False,
            lifespan="off",
            ssl_certfile=self.options.tls_cert,
            ssl_keyfile=self.options.tls_key,
            timeout_graceful_shutdown=2,
        )
        config.load()
        return uvicorn.Server(config)

    def _make_store(self) -> MetadataStore:
        if self.options.redis_url is None:
            return MemoryStore()
        from ramet.srt.modelexpress.server.redis_store import RedisStore  # redis is imported only where it is used

        try:
            return RedisStore(self.options.redis_url)
        except ValueError as error:
            raise ValueError(f"--redis-url: {error}") from None


def read_credentials(options: ServerOptions) -> grpc.ServerCredentials | None:
    """The TLS credentials in the files of --tls-cert and --tls-key; None without them.

    Raises:
        ValueError: if one of them cannot be read.
    """
    if options.tls_cert is None or options.tls_key is None:
        return None
    contents = []
    for flag, path in (("--tls-cert", options.tls_cert), ("--tls-key", options.tls_key)):
        try:
            with open(path, "rb") as file:
                contents.append(file.read())
        except OSError as error:
            raise ValueError(f"{flag}: {error}") from None
    return grpc.ssl_server_credentials([(contents[1], contents[0])])


def bind_grpc(server: grpc.aio.Server, options: ServerOptions, credentials: grpc.ServerCredentials | None) -> int:
    """Bind --port and return the port, which is another one if that is 0."""
    listen_on(options.host, options.port, "--port").close()  # says what is wrong better than grpc does
    address = format_address(options.host, options.port)
    try:
        if credentials is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, credentials)
    except RuntimeError:
        raise ValueError(
            f"cannot serve gRPC on {address}; are --tls-cert and --tls-key a certificate and its key?"
        ) from None


def bind_http(options: ServerOptions) -> socket.socket:
    """A listening socket on --metrics-port."""
    return listen_on(options.host, options.metrics_port, "--metrics-port")


def listen_on(host: str, port: int, flag: str) -> socket.socket:
    """A listening socket.

    Raises:
        ValueError: if the port cannot be bound; the message names it and its flag.
    """
    try:
        return net.listen_on(host, port)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(
            f"cannot bind {format_address(host, port)}: {reason}; choose another with {flag} or --host"
        ) from None
