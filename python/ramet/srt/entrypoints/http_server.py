"""Owns the serving of an instance over HTTP from its start to its end: readiness, signals, drain, the exit code."""

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import uvicorn
from starlette.types import ASGIApp

from ramet.srt.entrypoints.child_processes import LaunchError
from ramet.srt.entrypoints.http.body_check import BodyChecker
from ramet.srt.entrypoints.http.http_access import HEALTH_PATHS
from ramet.srt.entrypoints.http.http_front import without_root
from ramet.srt.entrypoints.http_api import create_app
from ramet.srt.entrypoints.instance import Instance
from ramet.srt.entrypoints.instance_info import ready_line
from ramet.srt.entrypoints.listener import BACKLOG, shares
from ramet.srt.server_args import ServerArgs
from ramet.srt.text.template_process import end_template_processes
from ramet.srt.utils.http_guard import HttpLimits, guarded_protocol, room_for_connections
from ramet.srt.utils.net import reachable_host
from ramet.srt.utils.tls_log import log_handshakes

logger = logging.getLogger(__name__)

FLUSH_TIMEOUT_S = 3  # for the last answers to reach their clients once nothing runs any more
KEEP_ALIVE_S = 60
HEAD_TIMEOUT_S = 300.0  # beyond --drain-timeout, for what node 0 does after it: a profile may take it minutes
SIGNALS = (signal.SIGTERM, signal.SIGINT)


def serve(instance: Instance, listener: socket.socket, check_signals: Callable[[], None]) -> None:
    """Serve a started `instance` on `listener` until SIGTERM or SIGINT; a second signal ends the process at once.

    Args:
        check_signals: called once signals are taken here; raises if one has come before.

    Raises:
        ValueError: if the tokenizer can't be read.
        LaunchError: if the instance can't start, or has ended because a child has.
    """
    with make_runner() as runner:
        runner.run(HttpServer(instance, listener).run(check_signals))


def make_runner() -> asyncio.Runner:
    """What runs the event loop of a server, the fastest that there is."""
    if find_spec("uvloop") is None:
        return asyncio.Runner()
    import uvloop

    return asyncio.Runner(loop_factory=uvloop.new_event_loop)


def make_server(app: ASGIApp, args: ServerArgs) -> "SignalFreeServer":
    """What serves an application as the flags say."""
    limits = HttpLimits(max_connections=room_for_connections(args.max_connections))
    config = uvicorn.Config(
        app,
        http=guarded_protocol(limits, lambda path: without_root(path, args.root_path).rstrip("/") in HEALTH_PATHS),
        ssl_certfile=args.ssl_certfile,
        ssl_keyfile=args.ssl_keyfile,
        ssl_keyfile_password=args.ssl_keyfile_password,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=FLUSH_TIMEOUT_S,
    )
    listed_as = reachable_host(args.host) if args.modelexpress is not None and args.node_rank == 0 else None
    return SignalFreeServer(config, f"listening on {args.url()}", listed_as)


class HttpServer:
    """One run of the HTTP server and the instance behind it."""

    def __init__(self, instance: Instance, listener: socket.socket):
        self._instance = instance
        self._listener = listener
        self._end = asyncio.Event()  # set by a signal or a death
        self._has_signal = False
        self._checker = BodyChecker(instance.model_config.vocab_size)
        self._app = create_app(instance, self._checker if instance.is_head else None)
        self._server = make_server(self._app, instance.server_args)

    async def run(self, check_signals: Callable[[], None]) -> None:
        """Serve until the end. Raises what `serve` raises."""
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._on_signal, signal.Signals(number).name)
        check_signals()
        instance = self._instance
        serving: asyncio.Task[None] | None = None
        try:
            instance.open(on_death=lambda _line: self._end.set(), on_end=self._end.set)
            serving = asyncio.create_task(self._server.serve(sockets=shares(self._listener)))
            serving.add_done_callback(lambda _task: self._end.set())
            if await instance.wait_ready(self._end):
                logger.info(ready_line(instance))
                gc.freeze()  # what there is now stays: the collector need not keep requests waiting to look through it
                await self._end.wait()
                if instance.death is None:
                    await instance.drain()
        finally:
            # Running requests get their error first, then the server waits for them to be sent.
            instance.fail_requests()
            if serving is not None:
                self._server.should_exit = True
                await serving
            self._app.flush_log()
            await self._checker.close()
            end_template_processes()  # Python would wait for the threads that wait for these
            await instance.close()
        if instance.death is not None:
            raise LaunchError(instance.death)

    def _on_signal(self, name: str) -> None:
        if self._has_signal:
            logger.warning("%s again: ending at once", name)
            self._instance.kill_processes()
            logging.shutdown()
            os._exit(1)
        self._has_signal = True
        drain_s = self._instance.server_args.drain_timeout
        if self._end.is_set():
            logger.info("%s: the end has begun already", name)  # another node, or a death, has been faster
            return
        if self._instance.ask_for_end():
            logger.info("%s: node 0 is told, and ends this node when its requests have ended", name)
            asyncio.get_running_loop().call_later(drain_s + HEAD_TIMEOUT_S, self._give_head_up)
            return
        logger.info("%s: running requests may end within %g s", name, drain_s)
        self._end.set()

    def _give_head_up(self) -> None:
        logger.warning(
            "node 0 has not ended the instance within %g s of --drain-timeout; this node ends", HEAD_TIMEOUT_S
        )
        self._end.set()


class SignalFreeServer(uvicorn.Server):
    """uvicorn's server without its own idea of signals, which says in a line of ours when it takes requests.

    Args:
        listed_as: the host that a metadata server names to clones; None if none does.
    """

    def __init__(self, config: uvicorn.Config, line: str, listed_as: str | None = None) -> None:
        super().__init__(config)
        self._line = line
        self._listed_as = listed_as
        self._watch: asyncio.Task[None] | None = None  # over the certificate

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        if self.config.ssl is not None:
            from ramet.srt.utils.tls_certificate import watch_certificate

            log_handshakes(self.config.ssl)
            certificate = str(self.config.ssl_certfile)
            self._watch = asyncio.create_task(watch_certificate(self.config.ssl, certificate, self._listed_as))
        await super().startup(sockets)
        if self.started:
            logger.info("%s", self._line)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._watch is not None:
            self._watch.cancel()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
