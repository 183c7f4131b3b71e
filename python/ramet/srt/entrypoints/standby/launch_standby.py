"""Owns the life of a standby's main process: `ramet standby`, from its flags to its exit code."""

import argparse
import contextlib
import dataclasses
import logging
from collections.abc import Sequence

from ramet.srt.cli_parser import CliParser
from ramet.srt.command_line import read_flags
from ramet.srt.entrypoints.child_processes import SCHEDULER_MODULE, LaunchError
from ramet.srt.entrypoints.launch import Interrupted, StartSignals, check_file_limit, fail
from ramet.srt.entrypoints.listener import bind
from ramet.srt.errors import limit_advice
from ramet.srt.observability.logs import configure_logging
from ramet.srt.observability.progress import process_start_time
from ramet.srt.observability.progress_bar import allow_bars
from ramet.srt.observability.traces import start_traces, stop_traces
from ramet.srt.utils.file_limit import raise_file_limit
from ramet.srt.utils.imports import importing

logger = logging.getLogger(__name__)

DEFAULT_KEPT = 2
DESCRIPTION = """Start a standby: an instance that has everything but a model, and becomes one when it is asked to
(POST /become). It takes the flags of ramet serve that say nothing of a model, for all models that it becomes."""


def main(argv: Sequence[str], prog: str = "ramet standby", scheduler_module: str = SCHEDULER_MODULE) -> int:
    """Be a standby as the flags say; the exit code: 0 after a signal, 1 with one line on stderr after a failure."""
    launch_time = process_start_time()
    parser = make_parser(prog)
    try:
        flags = read_flags(parser, argv)
        num_kept, shapes = flags.values.pop("keep_models"), flags.values.pop("shapes")
        with importing("fastapi"):
            from ramet.srt.entrypoints.standby.orders import make_template
        template = make_template(flags.values)
    except ValueError as error:
        return fail(error)
    configure_logging(template.log_level, "server", template.log_format)
    for note in flags.notes:
        logger.info("%s", note)
    if template.otlp_traces_endpoint is not None:
        try:
            start_traces(template.otlp_traces_endpoint, {"ramet.model": "standby"})
        except ValueError as error:
            return fail(error)
    allow_bars(template.log_format == "text")
    raise_file_limit()
    try:
        with StartSignals() as signals:
            check_file_limit()
            with contextlib.closing(bind(template.host, template.port)) as listener:
                template = dataclasses.replace(template, port=listener.getsockname()[1])
                logger.info("starting; users will be served on %s", template.url())
                with importing("fastapi"):
                    from ramet.srt.entrypoints.standby.standby_server import serve_standby
                signals.check()
                serve_standby(template, num_kept, shapes, launch_time, scheduler_module, listener, signals.check)
    except Interrupted:
        return 0
    except (ValueError, LaunchError) as error:
        return fail(error)
    except (OSError, MemoryError, RuntimeError) as error:
        if limit_advice(error) is None:
            raise
        return fail(error)
    finally:
        stop_traces()
    return 0


def make_parser(prog: str) -> CliParser:
    """Of its own flags; those of an instance are not there yet."""
    parser = CliParser(prog=prog, usage="%(prog)s [flags]", description=DESCRIPTION, allow_abbrev=False)
    group = parser.add_argument_group("Standby")
    group.add_argument(
        "--keep-models",
        type=_count,
        default=DEFAULT_KEPT,
        metavar="N",
        help="Models that it keeps when it becomes another one: processes, tokenizer, CUDA graphs and addresses, but "
        f"neither weights nor KV cache. They are back soonest. (default: {DEFAULT_KEPT})",
    )
    group.add_argument(
        "--shapes",
        type=_paths,
        default=(),
        metavar="MODEL,MODEL…",
        help="Models that it prepares before it is warm: all but their weights, of which none are read. The folders or "
        "hub ids that /become will name, with the standby's own flags.",
    )
    return parser


def _paths(text: str) -> tuple[str, ...]:
    paths = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if not all(paths):
        raise argparse.ArgumentTypeError(f"must be models with commas between them; got {text!r}")
    return paths


def _count(text: str) -> int:
    number = int(text) if text.isascii() and text.isdigit() else -1
    if not 0 <= number <= 64:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 64; got {text!r}")
    return number
