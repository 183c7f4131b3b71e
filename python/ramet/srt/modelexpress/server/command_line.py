"""Owns the life of the metadata server's process, from its flags to its exit code. It never imports torch."""

import dataclasses
import logging
import signal
import sys
import threading
from collections.abc import Sequence

from ramet.srt.cli_parser import CliParser
from ramet.srt.flags.log_flags import LOG_FORMATS, LOG_LEVELS
from ramet.srt.observability.logs import configure_logging
from ramet.srt.utils.file_limit import raise_file_limit

logger = logging.getLogger(__name__)

GRACE_S = 5.0
WATCH_INTERVAL_S = 1.0

FLAGS: dict[str, tuple[type, str]] = {
    "host": (str, "Address to bind; 0.0.0.0 for instances on other machines."),
    "port": (int, "Port of the gRPC service; 0 takes a free one."),
    "metrics_port": (int, "Port of the fleet page, /fleet.json, /metrics and /health over HTTP; 0 takes a free one."),
    "redis_url": (
        str,
        "Keep the records in this Redis (redis://host:port/database), in the reference server's layout, "
        "so that they outlive this server and several servers can share them.",
    ),
    "auth_token_file": (str, "File with accepted bearer tokens, one per line; it is read again when it changes."),
    "tls_cert": (str, "File with the certificate chain (PEM), for gRPC and HTTP."),
    "tls_key": (str, "File with the certificate's private key (PEM)."),
    "reaper_scan_interval": (
        float,
        "Seconds between two looks for silent workers (MX_REAPER_SCAN_INTERVAL_SECS, else 30).",
    ),
    "heartbeat_timeout": (
        float,
        "Seconds of silence after which a worker is stale (MX_HEARTBEAT_TIMEOUT_SECS, else 90).",
    ),
    "gc_timeout": (float, "Seconds after which a stale worker is forgotten (MX_GC_TIMEOUT_SECS, else 3600)."),
}


def make_parser(defaults: dict[str, object], prog: str) -> CliParser:
    parser = CliParser(
        prog=prog,
        description="Serve ModelExpress metadata: which instance holds which weights.",
        allow_abbrev=False,
    )
    for name, (kind, text) in FLAGS.items():
        default = defaults[name]
        shown = text if default is None else f"{text} (default: {default})"
        parser.add_argument(
            "--" + name.replace("_", "-"), type=kind, default=default, help=shown, metavar=kind.__name__.upper()
        )
    parser.add_argument("--log-level", choices=LOG_LEVELS, default="info", help="Least severe log level that is shown.")
    parser.add_argument("--log-format", choices=LOG_FORMATS, default="text", help="Form of the log's lines.")
    return parser


def serve_from_command_line(argv: Sequence[str], prog: str) -> int:
    """Serve until SIGTERM or SIGINT. Exit code 1, and one line, when the server cannot start."""
    try:
        from ramet.srt.modelexpress.server.server import ModelExpressServer, ServerOptions
    except ImportError as error:
        sys.stderr.write(f"{prog}: error: {error}; install ramet[modelexpress]\n")
        return 1
    defaults = {field.name: field.default for field in dataclasses.fields(ServerOptions)}
    values = vars(make_parser(defaults, prog).parse_args(argv))
    configure_logging(values.pop("log_level"), "modelexpress", values.pop("log_format"))
    raise_file_limit()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        server = ModelExpressServer(ServerOptions(**values))
        server.start()
    except ValueError as error:
        sys.stderr.write(f"{prog}: error: {error}\n")
        return 1
    while not stop.wait(WATCH_INTERVAL_S):
        if not server.is_alive():
            return 1
    logger.info("stopping; running calls have %.0f s to end", GRACE_S)
    server.close(GRACE_S)
    return 0
