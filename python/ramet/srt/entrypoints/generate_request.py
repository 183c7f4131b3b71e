"""Owns the native request, SGLang's /generate: what it may hold, the sequences it asks for, and how it is answered.

The HTTP route and `Engine` both use it.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Annotated, Any, ClassVar

import msgspec
from pydantic import ConfigDict, Field, WithJsonSchema

from ramet.srt.entrypoints.http import accepted_fields
from ramet.srt.entrypoints.http.accepted_fields import Table, describe_refused, foreign_schema, without_foreign
from ramet.srt.entrypoints.http.http_validation import (
    Priority,
    Prompts,
    PromptText,
    RequestBody,
    RequestId,
    TokenIds,
)
from ramet.srt.entrypoints.http.validation_words import UNSUPPORTED
from ramet.srt.errors import RequestError
from ramet.srt.lora.adapter import MAX_NAME_LEN
from ramet.srt.managers.generation import Generation, RunningSequence
from ramet.srt.managers.io_struct import TokenLogprobs
from ramet.srt.managers.lora_registry import LoraRegistry
from ramet.srt.managers.prepare_requests import MAX_TOP_LOGPROBS, Limits, SequenceInput
from ramet.srt.managers.tokenizer_manager import TokenizerManager
from ramet.srt.sampling.sampling_params import (
    MAX_TOKENS,
    SamplingParams,
    parse_sampling_params,
    sampling_params_schema,
)
from ramet.srt.text.tokenizer import Tokenizer

TOKENS_AT_ONCE = 64  # whose log-probabilities are written while nobody else has the event loop

Output = dict[str, Any]

SAMPLING_NAMES = frozenset(SamplingParams.__struct_fields__)


def _sampling_schema() -> dict[str, Any]:
    schema, others = sampling_params_schema(), foreign_schema(accepted_fields.SAMPLING)
    properties = others["properties"] | schema["properties"]
    return {**schema, "properties": properties, "additionalProperties": others["additionalProperties"]}


SamplingParamsBody = Annotated[
    dict[str, Any] | list[dict[str, Any]] | None,
    WithJsonSchema(
        {
            "anyOf": [
                _sampling_schema(),
                {"type": "array", "items": _sampling_schema(), "minItems": 1},
                {"type": "null"},
            ],
            "description": "How to sample: one object for all prompts, or a list with one for each.",
        }
    ),
]


EXACTLY_ONE_PROMPT: dict[str, Any] = {
    "oneOf": [
        {
            "required": ["text"],
            "properties": {"text": {"type": ["string", "array"]}, "input_ids": {"type": "null"}},
        },
        {
            "required": ["input_ids"],
            "properties": {"input_ids": {"type": "array"}, "text": {"type": "null"}},
        },
    ]
}


LoraName = Annotated[str, Field(max_length=MAX_NAME_LEN)]  # "" is none


class GenerateReqInput(RequestBody):
    """One or several prompts, as `text` or as `input_ids`, to be continued."""

    model_config = ConfigDict(json_schema_extra=EXACTLY_ONE_PROMPT)
    foreign: ClassVar[Table] = accepted_fields.GENERATE

    text: PromptText | Prompts[PromptText] | None = None
    input_ids: TokenIds | Prompts[TokenIds] | None = None
    sampling_params: SamplingParamsBody = None
    stream: bool | None = False
    return_logprob: bool | None = False
    logprob_start_len: Annotated[int, Field(ge=-1, le=MAX_TOKENS)] | None = None  # where nothing is generated 0, or -1
    top_logprobs_num: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = 0
    return_text_in_logprobs: bool | None = False
    rid: RequestId | None = None
    priority: Priority | None = None
    model: str | None = None  # the one that is served, or an adapter of it
    lora_path: LoraName | list[LoraName | None] | None = None  # adapters by their names; a list has one for each prompt

    def prompts(self) -> Sequence[str | list[int]]:
        """The prompts as a list.

        Raises:
            RequestError: unless exactly one of `text` and `input_ids` is given.
        """
        if (self.text is None) == (self.input_ids is None):
            raise RequestError("exactly one of text and input_ids must be given", param="text")
        if isinstance(self.text, str):
            return [self.text]
        if self.text is not None:
            return self.text
        ids: Any = self.input_ids
        return [ids] if isinstance(ids[0], int) else ids

    def choose_model(self, adapters: LoraRegistry, served: str) -> None:
        """Have the adapter that `model` names, where it names one, answer all prompts.

        Raises:
            RequestError: if there is no such model, or `lora_path` names others.
        """
        name = adapters.name_of(self.model, served)
        if name and self.lora_path not in (None, name):
            raise RequestError(f"model names the adapter {name!r}, and lora_path something else", param="lora_path")
        self.lora_path = name or self.lora_path

    @property
    def is_batch(self) -> bool:
        """Whether the client gave a list of prompts, and so gets a list of answers."""
        return isinstance(self.text, list) or (self.input_ids is not None and isinstance(self.input_ids[0], list))

    def sequence_inputs(self, limits: Limits) -> list[SequenceInput]:
        """One for each prompt; what its parameters don't say the model's defaults do.

        Raises:
            RequestError: that names what is wrong.
        """
        prompts = self.prompts()
        given = {} if self.sampling_params is None else self.sampling_params
        if isinstance(given, list) and len(given) != len(prompts):
            raise RequestError(
                f"sampling_params has {len(given)} entries for {len(prompts)} prompts", param="sampling_params"
            )
        adapters = self.lora_path if isinstance(self.lora_path, list) else [self.lora_path] * len(prompts)
        if len(adapters) != len(prompts):
            raise RequestError(f"lora_path has {len(adapters)} entries for {len(prompts)} prompts", param="lora_path")
        each = [_own_params(one) for one in given] if isinstance(given, list) else [_own_params(given)] * len(prompts)
        start = self.logprob_start_len
        return [
            SequenceInput(
                text=prompt if isinstance(prompt, str) else None,
                input_ids=None if isinstance(prompt, str) else prompt,
                sampling_params=parse_sampling_params(params, limits.vocab_size, limits.sampling_defaults),
                fit_max_new_tokens=params.get("max_new_tokens") is None,
                return_logprob=bool(self.return_logprob),
                logprob_start_len=(0 if params.get("max_new_tokens") == 0 else -1) if start is None else start,
                top_logprobs_num=self.top_logprobs_num or 0,
                stream=bool(self.stream),
                priority=self.priority or 0,
                lora_name=adapter or "",
                param="text" if isinstance(prompt, str) else "input_ids",
            )
            for prompt, params, adapter in zip(prompts, each, adapters, strict=True)
        ]


def _own_params(given: dict[str, Any]) -> dict[str, Any]:
    """Sampling parameters without those that are not read, and say nothing. Raises RequestError for one that does."""
    if SAMPLING_NAMES.issuperset(given):
        return given
    own = without_foreign(given, SAMPLING_NAMES, accepted_fields.SAMPLING)
    for name in own:
        if name in accepted_fields.SAMPLING:
            raise RequestError(
                f"{name} {describe_refused(name, accepted_fields.SAMPLING)}", param=name, code=UNSUPPORTED
            )
    return own


async def answer_request(manager: TokenizerManager, request: GenerateReqInput) -> Output | list[Output]:
    """The output of a request that is not streamed; a list for a list of prompts or for `n` above 1.

    Raises:
        RequestError: that names what is wrong in the request.
        ServiceError: if the instance can't answer it.
    """
    generation = await _start(manager, request)
    outputs = []
    for sequence in await generation.finish():
        shown = ShownLogprobs(request, manager.tokenizer)
        await shown.catch_up(sequence)
        outputs.append(native_output(sequence, shown))
    return outputs if _has_several(request, generation) else outputs[0]


async def stream_request(manager: TokenizerManager, request: GenerateReqInput) -> AsyncGenerator[Output, None]:
    """The outputs of a streamed request as they grow, each with all text so far. Leaving early aborts it.

    Raises what `answer_request` raises.
    """
    generation = await _start(manager, request)
    has_several = _has_several(request, generation)
    shown = [ShownLogprobs(request, manager.tokenizer) for _ in generation.sequences]
    async with aclosing(generation.updates()) as updates:
        async for update in updates:
            sequence = generation.sequences[update.index]
            await shown[update.index].catch_up(sequence)
            yield native_output(sequence, shown[update.index], update.index if has_several else None)


async def _start(manager: TokenizerManager, request: GenerateReqInput) -> Generation:
    return await manager.generate(request.sequence_inputs(manager.limits), request.rid or None)


def _has_several(request: GenerateReqInput, generation: Generation) -> bool:
    return request.is_batch or len(generation.sequences) > 1


class ShownLogprobs:
    """A sequence's log-probabilities as /generate writes them: those of each token are made once, for all events."""

    def __init__(self, request: GenerateReqInput, tokenizer: Tokenizer) -> None:
        self.fields: dict[str, list[Any]] = {}
        self._wanted = bool(request.return_logprob)
        self._with_top = bool(request.top_logprobs_num)
        self._tokenizer = tokenizer if request.return_text_in_logprobs else None

    async def catch_up(self, sequence: RunningSequence) -> None:
        """Make `fields` those of the sequence so far, in steps between which others have the event loop."""
        if not self._wanted:
            return
        for name, logprobs in (("input", sequence.input_logprobs), ("output", sequence.output_logprobs)):
            tokens = self.fields.setdefault(f"{name}_token_logprobs", [])
            tops = self.fields.setdefault(f"{name}_top_logprobs", []) if self._with_top else None
            while (start := len(tokens)) < len(logprobs.token_ids):
                if start:
                    await asyncio.sleep(0)
                part = _slice(logprobs, start, start + TOKENS_AT_ONCE)
                tokens += token_logprobs(part, self._tokenizer)
                if tops is not None:
                    tops += top_logprobs(part, self._tokenizer)


def _slice(logprobs: TokenLogprobs, start: int, stop: int) -> TokenLogprobs:
    return TokenLogprobs(
        logprobs=logprobs.logprobs[start:stop],
        token_ids=logprobs.token_ids[start:stop],
        top_logprobs=logprobs.top_logprobs[start:stop],
        top_token_ids=logprobs.top_token_ids[start:stop],
        ranks=logprobs.ranks[start:stop],
    )


def native_output(sequence: RunningSequence, shown: ShownLogprobs, index: int | None = None) -> Output:
    """The sequence's output so far, as /generate answers it; with its `index` in streams of several."""
    reason = sequence.finish_reason
    meta_info: dict[str, Any] = {
        "id": sequence.request.rid,
        "finish_reason": None if reason is None else msgspec.to_builtins(reason),
        "prompt_tokens": sequence.prompt_tokens,
        "completion_tokens": len(sequence.output_ids),
        "cached_tokens": sequence.cached_tokens,
        "e2e_latency": sequence.e2e_latency_s,
        "weight_version": sequence.weight_version,
        "weight_versions": sequence.weight_versions,
    }
    if sequence.request.lora_name:
        meta_info["lora_name"] = sequence.request.lora_name
    meta_info |= shown.fields
    output: Output = {"text": sequence.text, "output_ids": list(sequence.output_ids), "meta_info": meta_info}
    if index is not None:
        output["index"] = index
    return output


def token_logprobs(logprobs: TokenLogprobs, tokenizer: Tokenizer | None) -> list[list[Any]]:
    """[[logprob, token id, text or None], …]; text where a tokenizer is given."""
    return [
        [logprob, token_id, _text(token_id, tokenizer)]
        for logprob, token_id in zip(logprobs.logprobs, logprobs.token_ids, strict=True)
    ]


def top_logprobs(logprobs: TokenLogprobs, tokenizer: Tokenizer | None) -> list[list[list[Any]] | None]:
    """For each token a list as of `token_logprobs`; None for a prompt's first token."""
    return [
        [[logprob, token_id, _text(token_id, tokenizer)] for logprob, token_id in zip(values, ids, strict=True)] or None
        for values, ids in zip(logprobs.top_logprobs, logprobs.top_token_ids, strict=True)
    ]


def _text(token_id: int, tokenizer: Tokenizer | None) -> str | None:
    return None if tokenizer is None else tokenizer.token_bytes(token_id).decode("utf-8", errors="replace")
