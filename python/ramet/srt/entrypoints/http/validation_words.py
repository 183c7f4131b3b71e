"""Owns the words for what is wrong with a body: those of the API, whatever the library that has looked calls it."""

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from ramet.srt.entrypoints.http.accepted_fields import Table, describe_refused

UNSUPPORTED = "unsupported_parameter"
NO_FIELDS: Table = {}
MAX_SHOWN_CHARS = 60
# What a value of a type is called, by the library's word for the type's error.
TYPES = {
    "string_type": "a string",
    "string_sub_type": "a string",
    "int_type": "an integer",
    "int_parsing": "an integer",
    "int_from_float": "an integer",
    "int_parsing_size": "an integer of fewer digits",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "dict_attributes_type": "an object",
    "none_required": "null",
    "finite_number": "a finite number",
}
LIMITS = {
    "greater_than_equal": ("ge", "at least {}"),
    "greater_than": ("gt", "above {}"),
    "less_than_equal": ("le", "at most {}"),
    "less_than": ("lt", "below {}"),
}
LENGTHS = {
    "string_too_short": ("min_length", "have at least {} characters"),
    "string_too_long": ("max_length", "have at most {} characters"),
    "too_short": ("min_length", "have at least {} entries"),
    "too_long": ("max_length", "have at most {} entries"),
}


class _Mistake(NamedTuple):
    path: tuple[str | int, ...]  # names and places in the body alone
    error: Any

    @property
    def is_of_type(self) -> bool:
        return self.error["type"] in TYPES

    @property
    def weight(self) -> tuple[bool, int, list[int]]:
        """The mistake that tells most has the largest: a union's members all complain, most of them of the type."""
        return not self.is_of_type, len(self.path), [part for part in self.path if isinstance(part, int)]


def describe_unreadable(error: BaseException | None) -> str:
    """Why a body could not be parsed, by what json.loads has raised."""
    if isinstance(error, json.JSONDecodeError):
        return f"the body is not valid JSON: {error.msg}"
    if isinstance(error, UnicodeDecodeError):
        return "the body is not text in UTF-8"
    if isinstance(error, RecursionError):
        return "the body is nested too deeply"
    return "the body can't be parsed"  # too large for the memory, or a number of thousands of digits


def describe_validation_errors(
    errors: Sequence[Any], body: Any = None, foreign: Table = NO_FIELDS
) -> tuple[str, str | None, str | None]:
    """Message, parameter and code for what pydantic has found.

    A location is ("messages", 0, "user", "content", "str"): besides names and places it has the members of unions that
    were tried. `body`, what was looked at, tells which is which.

    Args:
        foreign: the fields that the body's route knows and does not read.
    """
    if errors[0]["type"] == "json_invalid":
        return f"the body is not valid JSON: {errors[0]['ctx']['error']}", None, None
    mistakes = [_Mistake(_path(error, body), error) for error in errors]
    if not mistakes[0].path:
        reason = errors[0].get("ctx", {}).get("error", "the body must be a JSON object")
        return str(reason), None, None
    param = mistakes[0].path[0]
    most = max((one for one in mistakes if one.path[:1] == (param,)), key=lambda one: one.weight)
    if most.error["type"] == "extra_forbidden":
        name = str(most.path[-1])
        return (
            f"{_write(most.path)} {describe_refused(name, None if len(most.path) > 1 else foreign)}",
            name,
            UNSUPPORTED,
        )
    alike = [one.error for one in mistakes if one.path == most.path and one.is_of_type == most.is_of_type]
    return f"{_write(most.path)}{_describe(most.error, alike)}", str(param), None


def _path(error: Any, body: Any) -> tuple[str | int, ...]:
    """The names and places in an error's location."""
    location = error["loc"]
    path: list[str | int] = []
    value = body
    for number, part in enumerate(location):
        if _has(value, part):
            value = value[part]
        elif (number < len(location) - 1 or error["type"] != "missing") and (body is not None or path):
            continue  # a union's member
        path.append(part)
    return tuple(path)


def _has(value: Any, part: str | int) -> bool:
    if isinstance(value, list):
        return isinstance(part, int) and part < len(value)
    return isinstance(value, dict) and part in value


def _write(path: Sequence[str | int]) -> str:
    """messages[0].content; names that are a user's own stand in brackets, too."""
    text = ""
    for part in path:
        if isinstance(part, str) and text != "logit_bias" and re.fullmatch(r"[A-Za-z_]\w{0,63}", part, re.ASCII):
            text += f".{part}" if text else part
        else:
            shown = str(part) if isinstance(part, int) else f"{part!r:.{MAX_SHOWN_CHARS}}"
            text += f"[{shown}]"
    return text


def _describe(error: Any, alike: Sequence[Any]) -> str:
    """What comes behind the path."""
    kind, given, context = error["type"], error.get("input"), error.get("ctx", {})
    if kind in TYPES:
        return f" must be {' or '.join(dict.fromkeys(TYPES[one['type']] for one in alike))}, not {_show(given)}"
    if kind in LIMITS:
        name, words = LIMITS[kind]
        return f" must be {words.format(context[name])}, not {_show(given)}"
    if kind in LENGTHS:
        return _describe_length(kind, context)
    if kind.startswith("union_tag_"):
        return _describe_tag(kind, given, context)
    if kind == "literal_error":
        values = dict.fromkeys(re.findall(r"'([^']*)'", " ".join(one["ctx"]["expected"] for one in alike)))
        one_of = "one of " if len(values) > 1 else ""
        return f" must be {one_of}{', '.join(values) or context['expected']}, not {_show(given)}"
    if kind == "string_pattern_mismatch":
        is_key = error["loc"][-1] == "[key]"
        return ": the key is not a token id" if is_key else f" must match {context['pattern']}, not {_show(given)}"
    if kind == "string_unicode":
        return " holds a lone surrogate, which is no text"
    if kind in ("value_error", "assertion_error"):
        return f": {context['error']}"
    return " must be given" if kind == "missing" else f" can't be {_show(given)}"


def _describe_length(kind: str, context: Any) -> str:
    name, words = LENGTHS[kind]
    if name == "min_length" and context[name] == 1:
        return " must not be empty"
    length = context.get("actual_length")
    return f" must {words.format(context[name])}" + (f", not {length}" if length else "")


def _describe_tag(kind: str, given: Any, context: Any) -> str:
    """What is wrong with the field that says of which kind an object is."""
    name = context["discriminator"].strip("'")
    if not isinstance(given, dict):
        return f" must be an object, not {_show(given)}"
    if kind == "union_tag_not_found":
        return f".{name} must be given"
    return f".{name} must be one of {context['expected_tags'].replace(chr(39), '')}, not {_show(given.get(name))}"


def _show(value: Any) -> str:
    """A value in an error."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, str):
        return f"{value!r:.{MAX_SHOWN_CHARS}}"
    try:
        return json.dumps(value)[:MAX_SHOWN_CHARS]
    except (TypeError, ValueError):  # no JSON: from Python, or a number of thousands of digits
        return f"a {type(value).__name__}"
