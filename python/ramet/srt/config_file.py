"""Owns the file that --config names: YAML, whose keys are flags without their dashes. It becomes a command line."""

import json
from argparse import Action
from typing import Any

from ramet.srt.cli_parser import CliParser, JoinAction, did_you_mean

CONFIG_FLAG = "--config"
SWITCH = {"true": True, "false": False}
NOTHING = ("", "null", "~")  # unless in quotes
JSON_LISTS = ("-send-weights-group-ports",)  # ends of flags whose one value is a list
NAMELESS = ("help", "version", "config")  # flags that mean nothing in a file


def read_config_file(path: str, parser: CliParser) -> list[str]:
    """The flags of a file as arguments for `parser`. A value stays as it is written: 1.10 is no number here.

    Keys are flags with or without their dashes at the front; inside, _ is as good as -. A switch is true or false, null
    is the same as no line, a list is several values where a flag takes them, and an object is JSON.

    Raises:
        ValueError: if it can't be read, or has a key that is no flag, one twice, or several values for a flag of one.
    """
    import yaml  # seldom needed at a start

    try:
        with open(path, encoding="utf-8") as file:
            root = yaml.compose(file, Loader=yaml.SafeLoader)
    except OSError as error:
        raise ValueError(f"{CONFIG_FLAG}: {path} can't be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{CONFIG_FLAG}: {path} is no YAML: {' '.join(str(error).split())}") from None
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{CONFIG_FLAG}: {path} must have flags and their values, as in tp-size: 2")
    actions = parser.actions()
    argv: list[str] = []
    seen: dict[str, str] = {}
    for key, value in root.value:
        name = _flag_of(key, path, actions)
        action = actions[name]
        field = name if action.const is not None and action.nargs == 0 else action.dest
        if field in seen:
            raise ValueError(f"{CONFIG_FLAG}: {path} has {seen[field]} and {key.value}, which are one flag")
        seen[field] = key.value
        argv += _arguments(name, action, value, f"{CONFIG_FLAG}: {path}, {key.value}")
    return argv


def _flag_of(key: Any, path: str, actions: dict[str, Action]) -> str:
    """The flag that a key means. Raises ValueError."""
    word = str(key.value).strip()
    name = "--" + word.lstrip("-").replace("_", "-")
    if name[2:] in NAMELESS:
        raise ValueError(f"{CONFIG_FLAG}: {path} has {word}, which is for the command line alone")
    if name not in actions:
        hint = did_you_mean(name, (one for one in actions if one.startswith("--") and one[2:] not in NAMELESS)).replace(
            " --", " "
        )
        raise ValueError(f"{CONFIG_FLAG}: {path} has {word}, which is no flag{hint}")
    return name


def _arguments(name: str, action: Action, node: Any, where: str) -> list[str]:
    """A flag with its values, as a command line has it. Raises ValueError for a switch that is neither on nor off."""
    if node.id == "scalar" and node.style is None and node.value.lower() in NOTHING:
        return []
    if action.nargs == 0:
        is_on = SWITCH.get(node.value.lower()) if node.id == "scalar" else None
        if is_on is None:
            raise ValueError(f"{where} must be true or false")
        return [name] if is_on else []
    takes_several = action.nargs == "+" or isinstance(action, JoinAction)
    if node.id == "sequence" and not takes_several and not name.endswith(JSON_LISTS):
        raise ValueError(f"{where} takes one value, not a list")
    nodes = node.value if node.id == "sequence" and takes_several else [node]
    return [f"{name}={_text(one)}" for one in nodes]


def _text(node: Any) -> str:
    """A value as it is written; lists and objects as JSON."""
    import yaml

    if node.id == "scalar":
        return str(node.value)
    return json.dumps(yaml.SafeLoader("").construct_object(node, deep=True), default=str)
