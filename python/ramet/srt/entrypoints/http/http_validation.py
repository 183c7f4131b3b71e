"""Owns what request bodies have in common: pieces of their schema, and words for what is wrong with them."""

from typing import Annotated, Any, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic.functional_validators import ModelWrapValidatorHandler

from ramet.srt.sampling.sampling_params import MAX_TOKENS, is_unicode, with_whole_numbers

MAX_PROMPTS = 4096  # in one request
TokenId = Annotated[int, Field(ge=0, le=MAX_TOKENS)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]


def _check_unicode(text: str) -> str:
    if not is_unicode(text):
        raise ValueError("a string with a lone surrogate is no text")
    return text


Text = Annotated[str, AfterValidator(_check_unicode)]  # a JSON string may be none
PromptText = Annotated[str, Field(min_length=1)]
Prompt = TypeVar("Prompt")
Prompts = Annotated[list[Prompt], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]


class RequestBody(BaseModel):
    """A JSON object with known fields of exact types: no unknown ones, no "1" for 1, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="wrap")
    @classmethod
    def _accept_whole_floats(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """3.0 is an integer in JSON: try again with 3. The usual body pays nothing for this."""
        try:
            return handler(data)
        except ValidationError as error:
            if not any(one["type"] == "int_type" and isinstance(one["input"], float) for one in error.errors()):
                raise
        return handler(with_whole_numbers(data))


def _most_telling(errors: Any) -> Any:
    """Of the errors of the first wrong parameter: a union's members all complain, most of them about the type alone."""
    names = [next((part for part in error["loc"] if part not in ("body", "query", "path")), None) for error in errors]
    same = [error for error, name in zip(errors, names, strict=True) if name == names[0]]
    return next((error for error in same if not error["type"].endswith("_type")), same[0])


def describe_validation_errors(errors: Any) -> tuple[str, str | None, str | None]:
    """Message, parameter and code for what pydantic found first.

    A location is ("body", "messages", 0, "user", "content", "str"), or the same without "body" outside HTTP: besides
    names and places it has the members of unions that were tried, so only its first name is surely a parameter.
    """
    first = _most_telling(errors)
    path = list(first["loc"])
    if path and path[0] in ("body", "query", "path"):
        path = path[1:]
    if first["type"] == "json_invalid":
        return f"the body is not valid JSON: {first['ctx']['error']}", None, None
    if not path:
        return "the body must be a JSON object", None, None
    if first["type"] == "extra_forbidden" or first.get("ctx", {}).get("max_length") == 0:
        name = str(path[-1])
        where = "" if len(path) == 1 else f" in {path[0]}"
        return f"unknown or unsupported parameter {name!r}{where}", name, "unsupported_parameter"
    param = str(path[0])
    place = "".join(f"[{part}]" for part in path[1:] if isinstance(part, int))
    if param == "logit_bias" and len(path) > 1:
        place = f"[{path[1]!r:.60}]"  # its keys are a user's own
    field = f".{path[-1]}" if first["type"] == "literal_error" and isinstance(path[-1], str) and len(path) > 1 else ""
    return f"{param}{place}{field}: {first['msg']}", param, None
