"""Owns what request bodies have in common: pieces of their schema, and which of their fields are taken and not read."""

from typing import Annotated, Any, ClassVar, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ValidationError,
    model_validator,
)
from pydantic.functional_validators import ModelWrapValidatorHandler
from pydantic_core import CoreSchema

from ramet.srt.entrypoints.http.accepted_fields import Table, foreign_schema, without_foreign
from ramet.srt.entrypoints.http.validation_words import describe_validation_errors
from ramet.srt.errors import RequestError
from ramet.srt.sampling.sampling_params import MAX_TOKENS, is_unicode, with_whole_numbers

MAX_PROMPTS = 4096  # in one request
MAX_PRIORITY = 2**31 - 1
TokenId = Annotated[int, Field(ge=0, le=MAX_TOKENS)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]


def _check_unicode(text: str) -> str:
    if not is_unicode(text):
        raise ValueError("a string with a lone surrogate is no text")
    return text


Text = Annotated[str, AfterValidator(_check_unicode)]  # a JSON string may be none
RequestId = Annotated[Text, Field(max_length=256)]  # "" is none
Priority = Annotated[int, Field(ge=-MAX_PRIORITY - 1, le=MAX_PRIORITY)]
PromptText = Annotated[str, Field(min_length=1)]
Prompt = TypeVar("Prompt")
Prompts = Annotated[list[Prompt], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]


class RequestBody(BaseModel):
    """A JSON object with fields of exact types: no "1" for 1, no NaN. Of others, those are taken that say nothing."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    foreign: ClassVar[Table] = {}  # fields that are not read, and what is taken of them
    _names: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        cls._names = frozenset(field.alias or name for name, field in cls.model_fields.items())

    @classmethod
    def make(cls, **fields: Any) -> Self:
        """As the constructor, by the names that a body has, but a mistake is a RequestError that names the field."""
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            message, param, code = describe_validation_errors(error.errors(include_url=False), fields, cls.foreign)
            raise RequestError(message, param=param, code=code) from None

    @model_validator(mode="wrap")
    @classmethod
    def _tolerate(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Drop foreign fields. 3.0 is an integer in JSON: try again with 3. The usual body pays nothing for this."""
        if type(data) is dict and not cls._names.issuperset(data):
            data = without_foreign(data, cls._names, cls.foreign)
        try:
            return handler(data)
        except ValidationError as error:
            if not any(one["type"] == "int_type" and isinstance(one["input"], float) for one in error.errors()):
                raise
        return handler(with_whole_numbers(data))

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        schema = handler.resolve_ref_schema(handler(core_schema))
        others = foreign_schema(cls.foreign)
        schema["properties"] = others["properties"] | schema.get("properties", {})
        schema["additionalProperties"] = others["additionalProperties"]
        return schema
