"""Owns the bodies of the routes that generate nothing: embeddings, scores, ranks."""

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import ConfigDict, Field

from ramet.srt.entrypoints.http import accepted_fields
from ramet.srt.entrypoints.http.accepted_fields import Table
from ramet.srt.entrypoints.http.http_validation import (
    Prompts,
    PromptText,
    RequestBody,
    RequestId,
    Text,
    TokenId,
    TokenIds,
)

MAX_INPUTS = 2048  # of one request for embeddings, as OpenAI has it: an answer is thousands of numbers for each
MAX_DIMENSIONS = 2**31 - 1
MAX_LABELS = 4096
Input = TypeVar("Input")
Inputs = Annotated[list[Input], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)]
Dimensions = Annotated[int, Field(ge=1, le=MAX_DIMENSIONS)]
Prompt = str | list[int]


class PooledBody(RequestBody):
    """A body whose prompts are not continued."""

    foreign: ClassVar[Table] = accepted_fields.POOLING

    def sized_prompts(self) -> Iterator[tuple[str, Prompt]]:
        """Every text and list of token ids that must fit into the context, with its parameter."""
        raise NotImplementedError


class EmbeddingRequest(PooledBody):
    """POST /v1/embeddings."""

    input: PromptText | Inputs[PromptText] | TokenIds | Inputs[TokenIds]
    model: Text | None = None
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: Dimensions | None = None
    normalize: bool | None = None
    add_special_tokens: bool | None = True

    def prompts(self) -> list[Prompt]:
        """The inputs as a list."""
        return as_list(self.input)

    def sized_prompts(self) -> Iterator[tuple[str, Prompt]]:
        yield from named("input", self.prompts(), is_list=self.is_list)

    @property
    def is_list(self) -> bool:
        """Whether the client gave several inputs, be it one."""
        return isinstance(self.input, list) and not isinstance(self.input[0], int)


class EncodeReqInput(PooledBody):
    """POST /encode, SGLang's native call for embeddings."""

    text: PromptText | Inputs[PromptText] | None = None
    input_ids: TokenIds | Inputs[TokenIds] | None = None
    dimensions: Dimensions | None = None
    rid: RequestId | None = None

    def sized_prompts(self) -> Iterator[tuple[str, Prompt]]:
        for name, given in (("text", self.text), ("input_ids", self.input_ids)):
            if given is not None:
                yield from named(name, as_list(given), is_list=self.is_batch)

    @property
    def is_batch(self) -> bool:
        """Whether the client gave a list of prompts, and so gets a list of answers."""
        given = self.text if self.input_ids is None else self.input_ids
        return isinstance(given, list) and not isinstance(given[0], int)


class ScoredText(RequestBody):
    """A document as an object."""

    text: PromptText


Documents = Prompts[PromptText | ScoredText]
_LABELS = ("query", "items", "label_token_ids")
_SIDES = (("text_1", "text_2"), ("queries", "documents"), ("data_1", "data_2"))


def _one_of(*groups: tuple[str, ...]) -> dict[str, Any]:
    """JSON schema: all fields of one of the groups are given, and none of the others."""
    return {
        "oneOf": [
            {
                "required": list(group),
                "properties": {name: {"type": "null"} for other in groups if other != group for name in other},
            }
            for group in groups
        ]
    }


class ScoreRequest(PooledBody):
    """POST /v1/score: SGLang's, labels behind a query and each item; or vLLM's, texts side by side."""

    model_config = ConfigDict(json_schema_extra=_one_of(_LABELS, *_SIDES))

    model: Text | None = None

    query: Text | list[TokenId] | None = None
    items: Text | Prompts[Text] | Prompts[TokenIds] | None = None
    label_token_ids: Annotated[list[TokenId], Field(min_length=1, max_length=MAX_LABELS, fail_fast=True)] | None = None
    apply_softmax: bool | None = False
    item_first: bool | None = False

    text_1: PromptText | Prompts[PromptText] | None = None
    text_2: PromptText | Prompts[PromptText] | None = None
    queries: PromptText | Prompts[PromptText] | None = None
    documents: PromptText | Prompts[PromptText] | None = None
    data_1: PromptText | Prompts[PromptText] | None = None
    data_2: PromptText | Prompts[PromptText] | None = None
    instruct: PromptText | None = None
    instruction: PromptText | None = None

    @property
    def given_sides(self) -> list[tuple[str, str]]:
        """The names of the two sides to compare, in each of the spellings of which something is given."""
        return [names for names in _SIDES if any(getattr(self, name) is not None for name in names)]

    def sized_prompts(self) -> Iterator[tuple[str, Prompt]]:
        for name in ("query", "items", *(name for names in _SIDES for name in names)):
            given = getattr(self, name)
            if given is not None:
                is_list = isinstance(given, list) and bool(given) and not isinstance(given[0], int)
                yield from named(name, given if is_list else [given], is_list=is_list)


class RerankRequest(PooledBody):
    """POST /v1/rerank, in Jina's and Cohere's shape."""

    query: PromptText
    documents: Documents
    model: Text | None = None
    top_n: Annotated[int, Field(ge=1, le=MAX_DIMENSIONS)] | None = None
    return_documents: bool | None = True
    instruct: PromptText | None = None
    instruction: PromptText | None = None

    def texts(self) -> list[str]:
        """The documents' texts."""
        return [one.text if isinstance(one, ScoredText) else one for one in self.documents]

    def sized_prompts(self) -> Iterator[tuple[str, Prompt]]:
        yield "query", self.query
        yield from named("documents", self.texts(), is_list=True)


def as_list(given: Any) -> list[Prompt]:
    """One prompt, or a list of them, as a list."""
    return [given] if isinstance(given, str) or isinstance(given[0], int) else list(given)


def named(name: str, prompts: Any, *, is_list: bool) -> Iterator[tuple[str, Prompt]]:
    """Each prompt with what the client calls it."""
    for index, prompt in enumerate(prompts):
        yield f"{name}[{index}]" if is_list else name, prompt
