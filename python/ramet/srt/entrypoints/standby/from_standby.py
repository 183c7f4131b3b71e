"""Owns `ramet serve --from-standby`: a standby of this host becomes the model, and the port that was asked for is its.

Where there is no standby, or the flags say what none can be told, the instance is started as always.
"""

import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
import socket
from collections.abc import Sequence
from typing import Any

from ramet.srt.cli_parser import CliParser
from ramet.srt.command_line import read_flags
from ramet.srt.entrypoints.launch import fail, serve_from_command_line
from ramet.srt.entrypoints.listener import bind
from ramet.srt.entrypoints.standby.find_standby import Awake, NoStandbyError, StandbyFinder
from ramet.srt.entrypoints.standby.host_record import HostRecord, find_records
from ramet.srt.entrypoints.standby.orders import MODEL_FIELDS
from ramet.srt.entrypoints.standby.parked import ParkedModel
from ramet.srt.flags.flag import flag_name
from ramet.srt.observability.logs import configure_logging
from ramet.srt.server_args import ServerArgs

logger = logging.getLogger(__name__)

FLAG = "--from-standby"
WAKE_TIMEOUT_S = 600.0  # as long as weights may take to come
LOOK_S = 1.0
NUM_MISSES = 5  # looks without an answer, after which the instance has gone
# What this process does itself, or hands on as its key.
OWN_FIELDS = frozenset(
    {"host", "port", "log_level", "log_format", "api_key", "admin_api_key", "ssl_ca_certs", "device", "load_format"}
    | {"remote_instance_weight_loader_seed_instance_ip", "remote_instance_weight_loader_seed_instance_service_port"}
    | {"remote_instance_weight_loader_fallback", "enable_memory_saver", "from_standby"}
)


def serve_from_standby(argv: Sequence[str], prog: str) -> int:
    """Serve as the flags say, by a standby of this host if there is one; the exit code."""
    parser = CliParser(prog=prog, usage="%(prog)s MODEL [flags]", allow_abbrev=False)
    try:
        flags = read_flags(parser, argv)
        if "model_path" not in flags.values:
            parser.error("the following arguments are required: --model-path")
        flags.values.pop("from_standby", None)
        args = ServerArgs(**flags.values)
        configure_logging(args.log_level, "server", args.log_format)
        reason = why_not(args)
        records = [one for one in find_records() if args.device in ("auto", one.device)]
        if reason is None and records:
            with contextlib.closing(bind(args.host, args.port)) as listener:
                return asyncio.run(_serve(args, records, listener))
        logger.info("started without a standby: %s", reason or "there is none on this host")
    except ValueError as error:
        return fail(error)
    except NoStandbyError as error:
        logger.info("started without a standby: %s", error)
    return serve_from_command_line([word for word in argv if word != FLAG], prog)


def why_not(args: ServerArgs) -> str | None:
    """What of the flags no standby can be told; None if it can be told all."""
    for field in dataclasses.fields(args):
        if field.name in OWN_FIELDS or field.name in MODEL_FIELDS or field.name == "served_model_name":
            continue
        if getattr(args, field.name) != (() if field.metadata["several"] else field.default):
            return f"{flag_name(field.name)} is the standby's own"
    if len(args.served_model_name) > 1:
        return "a standby serves a model by one name"
    if args.load_format not in ("auto", "safetensors", "remote_instance") or len(args.seeds) > 1:
        return "no standby takes weights in this way"
    return None


def body_of(args: ServerArgs) -> dict[str, Any]:
    """The body of /become that is to do what the flags say."""
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    body = {name: value for name in MODEL_FIELDS if (value := getattr(args, name)) != defaults[name]}
    for name in ("model_path", "tokenizer_path", "chat_template"):
        if os.path.exists(body.get(name, "")):
            body[name] = os.path.abspath(body[name])  # the standby is in another folder
    if body["model_path"] != args.model_path:
        body["served_model_name"] = args.model_name
    if args.served_model_name:
        body["served_model_name"] = args.model_name
    if args.seeds:
        seed = args.seeds[0]
        body["seed"] = f"{'https://' * (seed.scheme == 'https')}{seed.name.removeprefix('https://')}"
        body["source"] = "auto" if args.remote_instance_weight_loader_fallback == "disk" else "instance"
    else:
        body["source"] = "files"
    return body


async def _serve(args: ServerArgs, records: Sequence[HostRecord], listener: socket.socket) -> int:
    """Raises NoStandbyError if none of them becomes the model."""
    finder = StandbyFinder([one.url for one in records], None, args.admin_api_key or args.api_key, args.ssl_ca_certs)
    end = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, end.set)
    parked = ParkedModel(body_of(args), finder, (), idle_timeout_s=0.0, wake_timeout_s=WAKE_TIMEOUT_S)
    awake = await parked.wake_now()
    host, port = listener.getsockname()[:2]
    args = dataclasses.replace(args, port=port)
    logger.info("listening on %s", args.url())
    logger.info("ready on %s, by the standby at %s", args.url(), awake.url)
    listener.setblocking(False)
    watching = asyncio.create_task(_watch(finder, awake, end))
    await parked.serve(listener, end)
    lost = watching.result() if watching.done() else None
    watching.cancel()
    if lost is not None:
        return fail(RuntimeError(lost))
    return 0


async def _watch(finder: StandbyFinder, awake: Awake, end: asyncio.Event) -> str | None:
    """Set `end` when the model is not served any more; why."""
    num_misses, reason = 0, f"the standby at {awake.url} serves {awake.served_model_name} no more"
    while True:
        await asyncio.sleep(LOOK_S)
        try:
            if not await asyncio.to_thread(finder.serves, awake):
                end.set()
                return reason
            num_misses = 0
        except (OSError, ValueError) as error:
            num_misses += 1
            if num_misses == NUM_MISSES:
                end.set()
                return f"{reason}: {error}"
