"""Owns what the OpenAI routes share: from a body to sampling parameters, usage counts, and tokens as text."""

import time
import uuid
from collections.abc import Sequence
from typing import Any

from ramet.srt.entrypoints.openai.protocol import SamplingBody
from ramet.srt.errors import RequestError
from ramet.srt.managers.generation import Generation, RunningSequence
from ramet.srt.managers.prepare_requests import SequenceInput
from ramet.srt.managers.tokenizer_manager import TokenizerManager
from ramet.srt.sampling.sampling_params import MAX_TOKENS, SamplingParams, parse_sampling_params
from ramet.srt.text.tokenizer import Tokenizer

OPENAI_NAMES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "sampling_seed": "seed"}
SAME_NAMES = (
    "n", "temperature", "top_p", "stop", "frequency_penalty", "presence_penalty", "logit_bias", "top_k", "min_p",
    "repetition_penalty", "stop_token_ids", "ignore_eos", "skip_special_tokens", "no_stop_trim", "regex", "ebnf",
)  # fmt: skip


class OpenAIServing:
    """The common part of the completions and the chat route.

    Args:
        model_name: the only one that requests may name.
    """

    def __init__(self, manager: TokenizerManager, model_name: str):
        self.manager = manager
        self.model_name = model_name

    def check_body(self, body: SamplingBody) -> None:
        """Raises RequestError for an unknown model, and for options that contradict each other."""
        if body.model != self.model_name:
            raise RequestError(
                f"the model {body.model!r} does not exist; this instance serves {self.model_name!r}",
                param="model",
                code="model_not_found",
                status_code=404,
            )
        if body.stream_options is not None and not body.stream:
            raise RequestError("stream_options is only allowed with stream", param="stream_options")

    def sampling_params(
        self, body: SamplingBody, max_tokens: int | None, json_schema: str | dict[str, Any] | None
    ) -> SamplingParams:
        """The body's sampling parameters; without `max_tokens` the output may fill the context.

        Raises:
            RequestError: that names the parameter as OpenAI calls it.
        """
        values = {name: getattr(body, name) for name in SAME_NAMES}
        values["max_new_tokens"] = MAX_TOKENS if max_tokens is None else max_tokens
        values["min_new_tokens"] = body.min_tokens
        values["sampling_seed"] = body.seed
        values["json_schema"] = json_schema
        try:
            limits = self.manager.limits
            return parse_sampling_params(values, limits.vocab_size, limits.sampling_defaults)
        except RequestError as error:
            raise with_openai_names(error) from None

    async def start(self, inputs: list[SequenceInput]) -> Generation:
        """Start the sequences; errors name parameters as OpenAI calls them."""
        try:
            return await self.manager.generate(inputs)
        except RequestError as error:
            raise with_openai_names(error) from None


def with_openai_names(error: RequestError) -> RequestError:
    """The error with OpenAI's names of the parameters."""
    message = str(error)
    for ours, theirs in OPENAI_NAMES.items():
        message = message.replace(ours, theirs)
    param = OPENAI_NAMES.get(error.param or "", error.param)
    return RequestError(message, param=param, code=error.code, status_code=error.status_code)


def answer_head(kind: str, prefix: str, model: str) -> dict[str, Any]:
    """The fields with which every answer and every chunk begins."""
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}


def usage(sequences: Sequence[RunningSequence], n: int) -> dict[str, Any]:
    """Token counts of one request whose prompts have `n` sequences each: a prompt counts once."""
    prompt_tokens = sum(sequence.prompt_tokens for sequence in sequences[::n])
    completion_tokens = sum(len(sequence.output_ids) for sequence in sequences)
    cached_tokens = sum(sequence.cached_tokens for sequence in sequences[::n])
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """A token as text; one that is no whole character as "bytes:\\xe2\\x82", which is OpenAI's way to write it."""
    raw = tokenizer.token_bytes(token_id)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
