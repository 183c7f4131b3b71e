"""Owns the commands on a fleet, its target version and its size, from their flags to their exit code."""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from ramet.srt.command_line import CliParser
from ramet.srt.weights.fleet import DEFAULT_MIN_SERVING, FleetState, FleetTarget, SetTarget
from ramet.srt.weights.pool import MAX_INSTANCES, PoolState, ScaleState, SetScale

if TYPE_CHECKING:
    from ramet.srt.modelexpress.client.client import ModelExpressClient

URL_HELP = "host:port of the metadata server; else MODEL_EXPRESS_URL, else MX_SERVER_ADDRESS, else localhost:8001."


def run_fleet_command(argv: Sequence[str], prog: str) -> int:
    """Set the version that all instances of a model shall serve, or how many there shall be, or show how far they are.

    Returns:
        0; or 1, and one line on stderr, if the server can't be reached or refuses.
    """
    values = make_parser(prog).parse_args(argv)
    try:
        from ramet.srt.modelexpress.client.client import ModelExpressClient, ModelExpressError
    except ImportError as error:
        sys.stderr.write(f"{prog}: error: {error}; install ramet[modelexpress]\n")
        return 1
    try:
        with ModelExpressClient(values.url) as client:
            if values.command == "status":
                states = msgspec.json.decode(client.call_fleet("Targets", b"{}"), type=list[FleetState])
                pool = msgspec.json.decode(_call_new(client, "Pool", b"{}"), type=PoolState)
                text = "".join(_describe(state) for state in states) + describe_pool(pool)
                sys.stdout.write(text or "no instance has reported\n")
                return 0
            if values.command == "scale":
                become = _read_become(values.become, values.model_path)
                scale = SetScale(model=values.model, instances=values.instances, become=become)
                answer = client.call_fleet("SetScale", msgspec.json.encode(scale))
                sys.stdout.write(f"{_describe_scale(msgspec.json.decode(answer, type=ScaleState))}\n")
                return 0
            version, share = ("", DEFAULT_MIN_SERVING)
            if values.command == "set-version":
                version, share = values.version, values.min_serving
            wanted = SetTarget(model=values.model, version=version, min_serving=share)
            answer = client.call_fleet("SetTarget", msgspec.json.encode(wanted))
            target = msgspec.json.decode(answer, type=FleetTarget)
    except (ModelExpressError, ValueError) as error:
        sys.stderr.write(f"{prog}: error: {error}\n")
        return 1
    sys.stdout.write(f"{values.model}: {_describe_target(target)}\n")
    return 0


def make_parser(prog: str) -> CliParser:
    """Of the commands' flags."""
    parser = CliParser(
        prog=prog, description="What the instances of a model serve, and how many there are.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    setting = commands.add_parser("set-version", help="Have all instances of a model serve a version.")
    setting.add_argument("model", help="The model's name, as the metadata server lists it.")
    setting.add_argument("version", help="The version's name: of an instance that has it, or a trainer.")
    setting.add_argument(
        "--min-serving",
        type=float,
        default=DEFAULT_MIN_SERVING,
        help=f"Share of the instances that stay ready while others change (default: {DEFAULT_MIN_SERVING}).",
    )
    clearing = commands.add_parser("clear-version", help="Have no target: whatever instances serve will do.")
    clearing.add_argument("model", help="The model's name.")
    scaling = commands.add_parser("scale", help="Have standbys become a model until there are so many instances of it.")
    scaling.add_argument("model", help="The model's name, as the metadata server lists it.")
    scaling.add_argument("instances", type=_number, help="How many there shall be; any: as many as there happen to be.")
    scaling.add_argument("--model-path", help="Folder or hub id on the standbys' hosts, where it is not the name.")
    scaling.add_argument("--become", help="JSON object that standbys are to get as the body of /become.")
    for one in (setting, clearing, scaling, commands.add_parser("status", help="Show how far the instances are.")):
        one.add_argument("--url", help=URL_HELP)
    return parser


def _describe(state: FleetState) -> str:
    lines = [f"{state.model}: {_describe_target(state.target)}"]
    for one in state.members:
        words = ["ready" if one.is_ready else "not ready"]
        words += ["takes the target"] * one.is_taking + [f"failed: {one.error}"] * bool(one.error)
        lines.append(f"  {one.instance}  {one.weight_version or 'no weights'}  {', '.join(words)}")
    return "\n".join(lines) + "\n"


def _describe_target(target: FleetTarget | None) -> str:
    if target is None or not target.version:
        return "no target"
    back = f", after {target.failed!r} failed ({target.reason})" if target.failed else ""
    return f"target {target.version!r}, at least {target.min_serving:.0%} serving{back}"


def describe_pool(pool: PoolState) -> str:
    """Standbys and what is wanted of them, in lines."""
    lines = [_describe_scale(state) for state in pool.models]
    for one in pool.standbys:
        words = [one.state, *([one.model] if one.model else ["warm" if one.is_warm else "not warm"])]
        words += [f"keeps {', '.join(one.kept)}"] * bool(one.kept) + [f"failed: {one.error}"] * bool(one.error)
        lines.append(f"  {one.instance}  {', '.join(words)}")
    return "".join(f"{line}\n" for line in lines)


def _describe_scale(state: ScaleState) -> str:
    wanted = "any number" if state.wanted is None else f"{state.wanted}"
    words = [f"{len(state.serving)} of {wanted} serve", *([f"{len(state.becoming)} become it"] * bool(state.becoming))]
    return f"{state.model}: {', '.join([*words, *([state.error] * bool(state.error))])}"


def _call_new(client: "ModelExpressClient", method: str, message: bytes) -> bytes:
    """A call that an older server does not have: nothing is known there."""
    from ramet.srt.modelexpress.client.client import ModelExpressError

    try:
        return client.call_fleet(method, message)
    except ModelExpressError as error:
        if error.code != "UNIMPLEMENTED":
            raise
        return msgspec.json.encode(PoolState(standbys=[], models=[]))


def _read_become(text: str | None, model_path: str | None) -> dict[str, Any] | None:
    """Raises ValueError if it is no object, or says another path."""
    if text is None:
        return None if model_path is None else {"model_path": model_path}
    try:
        body = msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise ValueError(f"--become must be a JSON object: {error}") from None
    if model_path is not None and body.get("model_path", model_path) != model_path:
        raise ValueError("--become and --model-path name two paths")
    return body if model_path is None else {**body, "model_path": model_path}


def _number(text: str) -> int | None:
    if text == "any":
        return None
    if not (text.isascii() and text.isdigit() and int(text) <= MAX_INSTANCES):
        raise argparse.ArgumentTypeError(f"must be a number from 0 to {MAX_INSTANCES}, or any; got {text!r}")
    return int(text)
