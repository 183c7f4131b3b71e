"""Owns the command line of an instance: it makes the flags that ServerArgs describes and reads them."""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, get_args, get_type_hints

import ramet
from ramet.srt.cli_parser import CliParser, JoinAction
from ramet.srt.config_file import CONFIG_FLAG, read_config_file
from ramet.srt.flags.flag import flag_name
from ramet.srt.server_args import ServerArgs
from ramet.srt.server_flags import NEEDLESS, sectioned_fields

NEEDLESS_DEST = "needless"
PATH_DEST = "model_path_alone"
STANDBY_FLAG = "--from-standby"


class Flags(NamedTuple):
    """What was given, by the fields of ServerArgs, and what is to be said of it in the log."""

    values: dict[str, Any]
    notes: list[str]


class CommandLine(NamedTuple):
    """What it asks for, and what is to be said of it in the log."""

    server_args: ServerArgs
    notes: list[str]


def add_cli_args(parser: argparse.ArgumentParser) -> None:
    """Add a flag for every field of ServerArgs, section by section, and those that stand for no field."""
    general = parser.add_argument_group("General")
    general.add_argument(
        PATH_DEST, nargs="?", default=argparse.SUPPRESS, metavar="MODEL", help="The same as --model-path."
    )
    general.add_argument(
        CONFIG_FLAG,
        default=argparse.SUPPRESS,
        metavar="FILE",
        help="YAML file with flags and their values, as in tp-size: 2; flags of the command line go before it.",
    )
    general.add_argument(
        STANDBY_FLAG,
        action="store_true",
        default=argparse.SUPPRESS,
        help="Have a standby of this host become the model if there is one: see docs/standby.md.",
    )
    general.add_argument("--version", action="version", version=ramet.__version__, help="Print the version.")
    hints = get_type_hints(ServerArgs)
    for section, fields in sectioned_fields():
        group = parser.add_argument_group(section)
        for field in fields:
            group.add_argument(flag_name(field.name), *field.metadata["aliases"], **_options(field, hints[field.name]))
    group = parser.add_argument_group("Without an effect", "Other servers' flags, taken with a line of the log.")
    for name, reason in NEEDLESS.items():
        group.add_argument(
            name, action="append_const", dest=NEEDLESS_DEST, const=name, default=argparse.SUPPRESS, help=reason
        )


def _options(field: dataclasses.Field[Any], hint: Any) -> dict[str, Any]:
    """What argparse is told of a field."""
    text = field.metadata["help"].replace("%", "%%")
    if field.default not in (dataclasses.MISSING, (), None, "") and field.default is not False:
        text += f" (default: {field.default})"
    options: dict[str, Any] = {"dest": field.name, "help": text, "default": argparse.SUPPRESS}
    if hint is bool:
        return options | {"action": "store_true"}
    if field.metadata["repeatable"]:
        options["action"] = JoinAction
    if field.metadata["several"]:
        options |= {"action": "extend", "nargs": "+"}
    options["type"] = next(kind for kind in (hint, *get_args(hint)) if kind in (int, float, str))
    options["metavar"] = options["type"].__name__.upper()
    if choices := field.metadata["choices"]:
        options |= {"choices": choices, "metavar": "{" + ",".join(choices) + "}"}
    return options


def parse_server_args(argv: Sequence[str], prog: str = "ramet.launch_server") -> ServerArgs:
    """The configuration that the command line asks for. Raises what `read_command_line` raises."""
    return read_command_line(argv, prog).server_args


def read_command_line(argv: Sequence[str], prog: str) -> CommandLine:
    """What the command line, and the file that --config names, ask for.

    Raises:
        ValueError: if a value is out of its range, two flags contradict each other, or the file can't be read.
        SystemExit: for --help, --version and for an unknown or missing flag (argparse prints a line; exit code 1).
    """
    parser = CliParser(
        prog=prog, usage="%(prog)s MODEL [flags]", description="Start one serving instance.", allow_abbrev=False
    )
    values, notes = read_flags(parser, argv)
    if values.pop("from_standby", False):
        raise ValueError(f"{STANDBY_FLAG} is for the command line of ramet serve alone")
    if "model_path" not in values:
        parser.error("the following arguments are required: --model-path")
    return CommandLine(ServerArgs(**values), notes)


def read_flags(parser: CliParser, argv: Sequence[str]) -> Flags:
    """The flags that the command line, and the file that --config names, give; `parser` may have others, too.

    Raises what `read_command_line` does.
    """
    add_cli_args(parser)
    values = _parse(parser, argv)
    if (path := values.pop(CONFIG_FLAG[2:], None)) is not None:
        in_file = _parse(parser, read_config_file(path, parser))
        needless = in_file.pop(NEEDLESS_DEST, []) + values.pop(NEEDLESS_DEST, [])
        values = in_file | values | {NEEDLESS_DEST: needless}
    notes = [f"{name} is not needed: {NEEDLESS[name]}" for name in dict.fromkeys(values.pop(NEEDLESS_DEST, []))]
    return Flags(values, notes)


def _parse(parser: CliParser, argv: Sequence[str]) -> dict[str, Any]:
    """The values that are given, by their fields; those of a flag with several as a tuple."""
    values = vars(parser.parse_args(argv))
    if (alone := values.pop(PATH_DEST, None)) is not None:
        if values.get("model_path", alone) != alone:
            parser.error(f"two models: {alone} and --model-path {values['model_path']}")
        values["model_path"] = alone
    return values
