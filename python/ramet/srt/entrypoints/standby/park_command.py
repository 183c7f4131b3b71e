"""Owns `ramet park`, from its flags to its exit code."""

import argparse
import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Sequence
from typing import Any

import msgspec

from ramet.srt.cli_parser import CliParser
from ramet.srt.entrypoints.launch import fail
from ramet.srt.entrypoints.listener import bind
from ramet.srt.entrypoints.standby.find_standby import StandbyFinder
from ramet.srt.entrypoints.standby.parked import ParkedModel
from ramet.srt.observability.logs import configure_logging

logger = logging.getLogger(__name__)

DESCRIPTION = """Hold the port of a model that no instance serves. The first request has a standby become the model,
waits for that, and is answered; after a time without requests the instance is a standby again."""


def main(argv: Sequence[str], prog: str = "ramet park") -> int:
    """Hold the port as the flags say; the exit code: 0 after a signal, 1 with one line on stderr after a failure."""
    values = make_parser(prog).parse_args(argv)
    try:
        body = _read_body(values.become, values.model)
        configure_logging(values.log_level, "park", values.log_format)
        finder = StandbyFinder(
            tuple(values.standby or ()), values.url, values.admin_api_key or values.api_key, values.ssl_ca_certs
        )
        keys = tuple(key for key in (values.api_key, values.admin_api_key) if key is not None)
        with contextlib.closing(bind(values.host, values.port)) as listener:
            asyncio.run(_serve(body, finder, keys, values, listener))
    except ValueError as error:
        return fail(error)
    return 0


async def _serve(
    body: dict[str, Any], finder: StandbyFinder, keys: tuple[str, ...], values: Any, listener: socket.socket
) -> None:
    end = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end.set)
    parked = ParkedModel(body, finder, keys, idle_timeout_s=values.idle_timeout, wake_timeout_s=values.wake_timeout)
    host, port = listener.getsockname()[:2]
    logger.info(
        "%s is parked: listening on http://%s:%d", body["model_path"], f"[{host}]" if ":" in host else host, port
    )
    listener.setblocking(False)
    await parked.serve(listener, end)


def make_parser(prog: str) -> CliParser:
    """Of its flags."""
    parser = CliParser(prog=prog, usage="%(prog)s MODEL [flags]", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("model", help="Folder or hub id, on the standbys' hosts.")
    parser.add_argument("--host", default="127.0.0.1", help="Address to bind (default: 127.0.0.1).")
    parser.add_argument("--port", type=_port, default=30000, help="Port to hold; 0 takes a free one (default: 30000).")
    parser.add_argument(
        "--standby", action="append", type=_url, help="URL of a standby; may be given again. They are asked in turn."
    )
    parser.add_argument("--url", help="host:port of the metadata server that knows standbys, where none are given.")
    parser.add_argument("--become", help="JSON object with more of the body of /become: served_model_name, source, …")
    parser.add_argument(
        "--idle-timeout",
        type=_seconds,
        default=300.0,
        help="Seconds without a byte until the instance is a standby again; 0: never (default: 300).",
    )
    parser.add_argument(
        "--wake-timeout", type=_seconds, default=120.0, help="Seconds that a request waits at most (default: 120)."
    )
    parser.add_argument(
        "--api-key", help="The standbys' key: a request must have it, or the next one, to wake anything."
    )
    parser.add_argument("--admin-api-key", help="The standbys' admin key, which /become needs where there is one.")
    parser.add_argument("--ssl-ca-certs", help="Certificates (PEM) that https standbys' are verified with.")
    parser.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    parser.add_argument("--log-format", default="text", choices=("text", "json"))
    return parser


def _read_body(text: str | None, model: str) -> dict[str, Any]:
    """Raises ValueError if it is no object, or names another model."""
    try:
        body = msgspec.json.decode(text or "{}", type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise ValueError(f"--become must be a JSON object: {error}") from None
    if body.get("model_path", model) != model:
        raise ValueError(f"--become names another model, {body['model_path']!r}")
    return {**body, "model_path": model}


def _url(text: str) -> str:
    if not text.startswith(("http://", "https://")):
        text = f"http://{text}"
    if ":" not in text.partition("://")[2]:
        raise argparse.ArgumentTypeError(f"must be host:port, or http:// or https:// before it; got {text!r}")
    return text


def _port(text: str) -> int:
    number = int(text) if text.isascii() and text.isdigit() else -1
    if not 0 <= number <= 65535:
        raise argparse.ArgumentTypeError(f"must be a port number; got {text!r}")
    return number


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 1e9:
        raise argparse.ArgumentTypeError(f"must be a number of seconds; got {text!r}")
    return seconds
