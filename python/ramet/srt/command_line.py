"""Owns the command line of an instance: it makes the flags that ServerArgs describes and reads them."""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any, get_args, get_type_hints

from ramet.srt.server_args import ServerArgs
from ramet.srt.server_flags import flag_name


def add_cli_args(parser: argparse.ArgumentParser) -> None:
    """Add a flag for every field of ServerArgs."""
    hints = get_type_hints(ServerArgs)
    for field in dataclasses.fields(ServerArgs):
        required = field.default is dataclasses.MISSING
        text = field.metadata["help"].replace("%", "%%")
        if not required and field.default not in ((), None) and field.default is not False:
            text += f" (default: {field.default})"
        options: dict[str, Any] = {"dest": field.name, "help": text, "default": argparse.SUPPRESS}
        if field.metadata["repeatable"]:
            options["action"] = _JoinAction
        if field.metadata["several"]:
            options |= {"action": "extend", "nargs": "+"}
        if hints[field.name] is bool:
            options["action"] = "store_true"
        else:
            hint = hints[field.name]
            options["type"] = next(kind for kind in (hint, *get_args(hint)) if kind in (int, float, str))
            options["metavar"] = options["type"].__name__.upper()
            options["required"] = required
            if field.metadata["choices"]:
                options["choices"] = field.metadata["choices"]
                options["metavar"] = "{" + ",".join(field.metadata["choices"]) + "}"
        parser.add_argument(flag_name(field.name), *field.metadata["aliases"], **options)


class _JoinAction(argparse.Action):
    """Joins the values of a flag that is given several times with commas."""

    def __call__(self, _parser: Any, namespace: Any, value: Any, _option_string: str | None = None) -> None:
        before = getattr(namespace, self.dest, None)
        setattr(namespace, self.dest, value if before is None else f"{before},{value}")


def parse_server_args(argv: Sequence[str], prog: str = "ramet.launch_server") -> ServerArgs:
    """The configuration that the command line asks for.

    Raises:
        ValueError: if a value is out of its range or two flags contradict each other.
        SystemExit: for --help and for an unknown or missing flag (argparse prints a line; exit code 1).
    """
    parser = CliParser(
        prog=prog,
        description="Start one serving instance.",
        allow_abbrev=False,
    )
    add_cli_args(parser)
    values = vars(parser.parse_args(argv))
    lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return ServerArgs(**values | lists)


class CliParser(argparse.ArgumentParser):
    """An ArgumentParser that answers bad input with one line and exit code 1."""

    def error(self, message: str) -> Any:
        self.exit(1, f"{self.prog}: error: {message}\n")
