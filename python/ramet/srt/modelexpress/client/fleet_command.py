"""Owns the commands on a fleet's target version, from their flags to their exit code."""

import sys
from collections.abc import Sequence

import msgspec

from ramet.srt.command_line import CliParser
from ramet.srt.weights.fleet import DEFAULT_MIN_SERVING, FleetState, FleetTarget, SetTarget

URL_HELP = "host:port of the metadata server; else MODEL_EXPRESS_URL, else MX_SERVER_ADDRESS, else localhost:8001."


def run_fleet_command(argv: Sequence[str], prog: str) -> int:
    """Set the version that all instances of a model shall serve, or show how far they are.

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
                sys.stdout.write("".join(_describe(state) for state in states) or "no instance has reported\n")
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
    parser = CliParser(prog=prog, description="The version that all instances of a model serve.", allow_abbrev=False)
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
    for one in (setting, clearing, commands.add_parser("status", help="Show how far the instances are.")):
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
