"""Owns a request's sampling parameters: their defaults, ranges, parsing and JSON schema. No torch."""

import json
import math
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from ramet.srt.errors import RequestError

MAX_TOKENS = 2**31 - 1  # beyond every context; what "as many as fit" is written as before it is clipped
MAX_SEQUENCES = 128  # largest n
MAX_LOGIT_BIAS = 4096  # tokens with a bias
MAX_ALLOWED_TOKENS = 1 << 16  # that an output is made of, where it says so
MAX_BAD_WORDS = 128
MIN_SEED, MAX_SEED = -(2**63), 2**63 - 1  # int64
TYPE_WORDS = {"int": "an integer", "float": "a number", "str": "a string", "bool": "true or false", "array": "a list",
              "object": "an object"}  # fmt: skip
ALSO_TAKEN = {"stop": "a string", "json_schema": "an object"}  # and brought to the parameter's own type
TOKEN_KEY = r"^(0|[1-9][0-9]{0,8})$"  # a token id as the key of a JSON object
GREEDY_TEMPERATURE = 1e-5  # below this a temperature means greedy: dividing by it would overflow
GRAMMAR_FIELDS = ("regex", "json_schema", "ebnf")

TokenCount = Annotated[int, Meta(ge=0, le=MAX_TOKENS)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
BadWord = Annotated[str, Meta(min_length=1, max_length=256)]
StopString = Annotated[str, Meta(min_length=1, max_length=4096)]


class SamplingParams(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """How to choose a sequence's tokens and when to stop, already validated and resolved.

    The names and defaults are those of SGLang's /generate.
    """

    max_new_tokens: TokenCount = 128  # 0: the prompt is computed, for its log-probabilities
    min_new_tokens: TokenCount = 0
    temperature: Annotated[float, Meta(ge=0, le=1e6)] = 1.0  # 0 means greedy
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Meta(ge=-1, le=MAX_TOKENS)] = -1  # -1: the whole vocabulary
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=10)] = 1.0  # smaller ones overflow
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    stop: Annotated[list[StopString], Meta(max_length=64)] = []
    stop_token_ids: Annotated[list[Annotated[int, Meta(ge=0, le=MAX_TOKENS)]], Meta(max_length=1024)] = []
    ignore_eos: bool = False
    logit_bias: Annotated[dict[int, Bias], Meta(max_length=MAX_LOGIT_BIAS)] = {}
    allowed_token_ids: Annotated[
        list[Annotated[int, Meta(ge=0, le=MAX_TOKENS)]], Meta(max_length=MAX_ALLOWED_TOKENS)
    ] = []
    bad_words: Annotated[list[BadWord], Meta(max_length=MAX_BAD_WORDS)] = []
    sampling_seed: Annotated[int, Meta(ge=MIN_SEED, le=MAX_SEED)] | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_SEQUENCES)] = 1
    regex: str | None = None
    json_schema: str | None = None
    ebnf: str | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True  # taken for SGLang's clients; a fast tokenizer has no such choice
    no_stop_trim: bool = False


def parse_sampling_params(
    data: Mapping[str, Any], vocab_size: int, defaults: Mapping[str, Any] = MappingProxyType({})
) -> SamplingParams:
    """Sampling parameters from what a user wrote: JSON values, or their Python equals. None means not given.

    What isn't given has its value in `defaults`, the model's own, or else SGLang's. `stop` may be one string,
    `json_schema` an object, and the keys of `logit_bias` strings.

    Raises:
        RequestError: (a ValueError) that names the parameter and what was expected of it.
    """
    if not isinstance(data, Mapping):
        raise RequestError("sampling_params must be an object", param="sampling_params")
    values = {**defaults, **{name: value for name, value in data.items() if value is not None}}
    unknown = [str(name) for name in values if name not in SamplingParams.__struct_fields__]
    if unknown:
        known = ", ".join(SamplingParams.__struct_fields__)
        raise RequestError(f"unknown sampling parameter {unknown[0]!r}; the known ones are {known}", param=unknown[0])
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise RequestError(f"{name} must be a finite number", param=name)
    if isinstance(values.get("stop"), str):
        values["stop"] = [values["stop"]]
    if isinstance(values.get("json_schema"), Mapping):
        try:
            values["json_schema"] = json.dumps(values["json_schema"])
        except (RecursionError, ValueError, TypeError) as error:
            raise RequestError(f"json_schema can't be written as JSON: {error}", param="json_schema") from None
    try:
        params = _convert(values)
    except msgspec.ValidationError as error:
        raise _named(error, values) from None
    except UnicodeEncodeError:
        name = next(name for name, value in values.items() if not _is_unicode_throughout(value))
        raise _not_unicode(name) from None
    _check_together(params, vocab_size)
    if params.temperature < GREEDY_TEMPERATURE:
        params.temperature = 0.0
    if params.top_k == 0:
        params.top_k = -1
    return params


def _convert(values: dict[str, Any]) -> SamplingParams:
    try:
        return msgspec.convert(values, SamplingParams, str_keys=True)
    except msgspec.ValidationError:
        return msgspec.convert(with_whole_numbers(values), SamplingParams, str_keys=True)


def with_whole_numbers(value: Any) -> Any:
    """A JSON value with 3 where it has 3.0: the same number in JSON, though not in Python.

    Goes by a list of what is left, for values are nested as deeply as a caller likes.
    """
    result = [value]
    left: list[Any] = [result]
    while left:
        container = left.pop()
        for place, item in container.items() if isinstance(container, dict) else enumerate(container):
            if isinstance(item, float) and item.is_integer():
                container[place] = int(item)
            elif isinstance(item, list | dict):
                container[place] = item.copy()
                left.append(container[place])
    return result[0]


def _named(error: msgspec.ValidationError, values: dict[str, Any]) -> RequestError:
    """msgspec's message, which ends in "at `$.name…`", with the parameter's name in front."""
    match = re.fullmatch(r"(?P<what>.*) - at (?:`key` in )?`\$\.(?P<name>\w+)(?P<rest>.*)`", str(error), re.DOTALL)
    if match is None:
        return RequestError(str(error), param="sampling_params")
    what = _in_words(match["what"])
    name, biases = match["name"], values.get("logit_bias")
    if name == "logit_bias" and isinstance(biases, Mapping):
        return RequestError(_describe_bad_bias(biases, what), param=name)
    if not match["rest"] and name in ALSO_TAKEN:
        what = what.replace("must be ", f"must be {ALSO_TAKEN[name]} or ", 1)
    return RequestError(f"{name}{match['rest']} {what}", param=name)


def _in_words(what: str) -> str:
    """msgspec's "Expected `int | null`, got `str`", or "Expected `float` >= 0.0", as what stands behind a name."""
    if found := re.fullmatch(r"Expected `([\w |]+)`, got `(\w+)`", what):
        kinds = [TYPE_WORDS.get(kind, kind) for kind in found[1].split(" | ") if kind != "null"]
        return f"must be {' or '.join(kinds)}, not {TYPE_WORDS.get(found[2], found[2])}"
    if found := re.fullmatch(r"Expected `\w+`( of length)? (>=|<=|>|<) (\S+)", what):
        relation = {">=": "at least", "<=": "at most", ">": "above", "<": "below"}[found[2]]
        if found[1] and (found[2], found[3]) == (">=", "1"):
            return "must not be empty"
        return f"must {'have a length of' if found[1] else 'be'} {relation} {found[3]}"
    return f"can't be used: {what[0].lower()}{what[1:].replace('`', '')}"


def _describe_bad_bias(biases: Mapping[Any, Any], what: str) -> str:
    """What is wrong with the first bad entry, whose key msgspec does not tell."""
    for key, bias in biases.items():
        shown = f"{key!r:.60}"
        try:
            msgspec.convert({key: 0}, dict[int, float], str_keys=True)
        except msgspec.ValidationError:
            return f"logit_bias: the key {shown} is not a token id, an int"
        try:
            msgspec.convert(bias, Bias)
        except msgspec.ValidationError:
            return f"logit_bias[{shown}] {what}"
    return f"logit_bias {what}"


def _check_together(params: SamplingParams, vocab_size: int) -> None:
    """What no single field's range can say.

    Raises:
        RequestError: that names the parameter.
    """
    if params.min_new_tokens > params.max_new_tokens:
        raise RequestError(
            f"min_new_tokens ({params.min_new_tokens}) is above max_new_tokens ({params.max_new_tokens})",
            param="min_new_tokens",
        )
    for name in ("stop_token_ids", "logit_bias", "allowed_token_ids"):
        for token_id in getattr(params, name):
            if not 0 <= token_id < vocab_size:
                raise RequestError(f"{name}: token id {token_id} is not in [0, {vocab_size})", param=name)
    for token_id, bias in params.logit_bias.items():
        if math.isnan(bias):
            raise RequestError(f"logit_bias[{token_id}] must be a finite number", param="logit_bias")
    grammars = [name for name in GRAMMAR_FIELDS if getattr(params, name) is not None]
    if len(grammars) > 1:
        raise RequestError(
            f"only one of {', '.join(GRAMMAR_FIELDS)} may be given; got {', '.join(grammars)}", param=grammars[1]
        )
    for name in ("stop", "bad_words", *GRAMMAR_FIELDS):
        value = getattr(params, name)
        if value and not _is_unicode_throughout(value):
            raise _not_unicode(name)


def _not_unicode(name: str) -> RequestError:
    return RequestError(f"{name} holds a lone surrogate, which is no text", param=name)


def _is_unicode_throughout(value: Any) -> bool:
    """Whether all strings in a JSON value can be written as UTF-8."""
    return is_unicode(json.dumps(value, ensure_ascii=False))


def is_unicode(text: str) -> bool:
    """Whether `text` can be written as UTF-8: a JSON string may hold lone surrogates, which can't."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def sampling_params_schema() -> dict[str, Any]:
    """The JSON schema of what `parse_sampling_params` accepts."""
    schema = msgspec.json.schema(SamplingParams)["$defs"]["SamplingParams"]
    properties = schema["properties"]
    properties["stop"]["anyOf"] = [
        {"type": "string", "minLength": 1, "maxLength": 4096},
        {name: properties["stop"].pop(name) for name in ("type", "items", "maxItems")},
    ]
    properties["json_schema"]["anyOf"].append({"type": "object"})
    properties["logit_bias"]["propertyNames"] = {"pattern": TOKEN_KEY}
    for field in properties.values():
        if "anyOf" not in field:
            default = field.pop("default")
            kept = dict(field)
            field.clear()
            field.update({"anyOf": [kept, {"type": "null"}], "default": default})
        elif {"type": "null"} not in field["anyOf"]:
            field["anyOf"].append({"type": "null"})
    schema.pop("required", None)
    return schema
