"""Owns what the OpenAI routes share: from a body to sampling parameters, usage counts, and tokens as text."""

import contextlib
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ramet.srt.entrypoints.openai.constraints import BodyConstraint
from ramet.srt.entrypoints.openai.protocol import SamplingBody
from ramet.srt.errors import RequestError
from ramet.srt.managers.generation import Generation, RunningSequence
from ramet.srt.managers.io_struct import TokenLogprobs
from ramet.srt.managers.prepare_requests import SequenceInput
from ramet.srt.managers.tokenizer_manager import TokenizerManager
from ramet.srt.sampling.sampling_params import MAX_TOKENS, SamplingParams, parse_sampling_params
from ramet.srt.text.tokenizer import Tokenizer

OPENAI_NAMES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "sampling_seed": "seed"}
SAME_NAMES = (
    "n", "temperature", "top_p", "stop", "frequency_penalty", "presence_penalty", "logit_bias", "top_k", "min_p",
    "repetition_penalty", "stop_token_ids", "ignore_eos", "skip_special_tokens", "allowed_token_ids", "bad_words",
)  # fmt: skip


class OpenAIServing:
    """The common part of the completions and the chat route.

    Args:
        model_name: of the model, by which, or by one of its adapters, a request may name it.
    """

    def __init__(self, manager: TokenizerManager, model_name: str):
        self.manager = manager
        self.model_name = model_name  # of what answers: an adapter, once a request has named one
        self.lora_name = ""

    def choose_model(self, name: str | None) -> None:
        """Answer with the model or the adapter that a request names; none is the model.

        Raises:
            RequestError: if it names neither.
        """
        self.lora_name = self.manager.adapters.name_of(name, self.model_name)
        asked = name if name in self.manager.adapters.also_served else None
        self.model_name = self.lora_name or asked or self.model_name

    def check_body(self, body: SamplingBody) -> None:
        """Raises RequestError for an unknown model, and for options that contradict each other."""
        self.choose_model(body.model)
        options = body.stream_options
        if options is not None and (options.include_usage or options.continuous_usage_stats) and not body.stream:
            raise RequestError("stream_options is only allowed with stream", param="stream_options")
        if body.prompt_logprobs is not None and body.stream:
            raise RequestError("prompt_logprobs are not there in a stream", param="prompt_logprobs")
        if body.rid and body.request_id and body.rid != body.request_id:
            raise RequestError("rid and request_id are two names of the same, but differ", param="request_id")

    def sampling_params(
        self, body: SamplingBody, max_tokens: int | None, constraint: BodyConstraint | None
    ) -> SamplingParams:
        """The body's sampling parameters; without `max_tokens` the output may fill the context.

        Args:
            constraint: what the output must keep to.

        Raises:
            RequestError: that names the parameter as native ones are called.
        """
        values = {name: getattr(body, name) for name in SAME_NAMES}
        if not body.stop:
            values["stop"] = None
        values["max_new_tokens"] = MAX_TOKENS if max_tokens is None else max_tokens
        values["min_new_tokens"] = body.min_tokens
        values["sampling_seed"] = body.seed
        values["no_stop_trim"] = body.no_stop_trim or body.include_stop_str_in_output
        if constraint is not None:
            values[constraint.kind] = constraint.value
        limits = self.manager.limits
        return parse_sampling_params(values, limits.vocab_size, limits.sampling_defaults)

    async def start(self, body: SamplingBody, inputs: list[SequenceInput]) -> Generation:
        """Start the sequences."""
        for one in inputs:
            one.lora_name = self.lora_name
        return await self.manager.generate(inputs, body.rid or body.request_id or None)


@contextlib.contextmanager
def openai_names(constraint: BodyConstraint | None) -> Iterator[None]:
    """A block whose RequestErrors call parameters as the body does, with that by which it has its `constraint`."""
    try:
        yield
    except RequestError as error:
        raise with_openai_names(error, constraint) from None


def with_openai_names(error: RequestError, constraint: BodyConstraint | None = None) -> RequestError:
    """The error with OpenAI's names of the parameters, and that by which the body has its `constraint`."""
    message, param = str(error), error.param
    if constraint is not None and param == constraint.kind:
        is_named = message.startswith(constraint.kind)
        message = constraint.name + (message[len(constraint.kind) :] if is_named else f": {message}")
        param = constraint.name
    else:
        for ours, theirs in OPENAI_NAMES.items():
            message = message.replace(ours, theirs)
        param = OPENAI_NAMES.get(param or "", param)
    return RequestError(message, param=param, code=error.code, status_code=error.status_code)


def answer_head(kind: str, prefix: str, model: str) -> dict[str, Any]:
    """The fields with which every answer and every chunk begins."""
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}


def usage(sequences: Sequence[RunningSequence], n: int, reasoning_tokens: int = 0) -> dict[str, Any]:
    """Token counts of one request whose prompts have `n` sequences each: a prompt counts once."""
    prompt_tokens = sum(sequence.prompt_tokens for sequence in sequences[::n])
    completion_tokens = sum(len(sequence.output_ids) for sequence in sequences)
    cached_tokens = sum(sequence.cached_tokens for sequence in sequences[::n])
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": reasoning_tokens},
    }


def version_metadata(sequences: Sequence[RunningSequence]) -> dict[str, Any]:
    """Which version of the weights has answered; and where more than one has, which of them made which tokens."""
    metadata: dict[str, Any] = {"weight_version": sequences[-1].weight_version}
    spans = [sequence.weight_versions for sequence in sequences]
    if len({span["version"] for each in spans for span in each}) > 1:
        metadata["weight_versions"] = spans
    return metadata


def sglext(sequences: Sequence[RunningSequence], n: int) -> dict[str, Any]:
    """SGLang's extension of answers: where the prefix cache's tokens lay, of which there is one place. See `usage`."""
    return {"cached_tokens_details": {"device": sum(one.cached_tokens for one in sequences[::n]), "host": 0}}


class StreamUsage:
    """What a stream's events say of its token counts: `stream_options`, `return_cached_tokens_details`."""

    def __init__(
        self,
        body: SamplingBody,
        sequences: Sequence[RunningSequence],
        n: int,
        num_reasoning_tokens: Callable[[], int] = lambda: 0,
    ):
        options = body.stream_options
        self._has_sglext = bool(body.return_cached_tokens_details)
        self._is_last = options is not None and bool(options.include_usage)
        self._is_each = options is not None and bool(options.continuous_usage_stats)
        self._sequences = sequences
        self._n = n
        self._num_reasoning_tokens = num_reasoning_tokens

    def on(self, event: dict[str, Any]) -> dict[str, Any]:
        """The event with the counts so far, or null where only the last event has them."""
        if self._is_each:
            event["usage"] = self._usage()
        elif self._is_last:
            event["usage"] = None
        return event

    def last(self, head: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The events that have nothing else."""
        if self._has_sglext:
            yield self.on({**head, "choices": [], "sglext": sglext(self._sequences, self._n)})
        if self._is_last:
            yield {**head, "choices": [], "usage": self._usage()}

    def _usage(self) -> dict[str, Any]:
        return usage(self._sequences, self._n, self._num_reasoning_tokens())


def prompt_logprobs(tokenizer: Tokenizer, logprobs: TokenLogprobs, num_top: int) -> list[dict[str, Any] | None]:
    """vLLM's form of a prompt's log-probabilities: for each token an object by token id; null for the first."""
    entries: list[dict[str, Any] | None] = []
    for place, (token_id, logprob) in enumerate(zip(logprobs.token_ids, logprobs.logprobs, strict=True)):
        if logprob is None:
            entries.append(None)
            continue
        top_ids = logprobs.top_token_ids[place][:num_top]
        found = {token_id: (logprob, logprobs.ranks[place])} | {
            top_id: (value, rank)
            for rank, (top_id, value) in enumerate(zip(top_ids, logprobs.top_logprobs[place], strict=False), 1)
        }
        entries.append(
            {
                str(one): {"logprob": value, "rank": rank, "decoded_token": token_text(tokenizer, one)}
                for one, (value, rank) in found.items()
            }
        )
    return entries


def token_name(tokenizer: Tokenizer, token_id: int, *, as_id: bool | None) -> str:
    """How log-probabilities name a token: by its text, or by vLLM's "token_id:N", which no two tokens share."""
    return f"token_id:{token_id}" if as_id else token_text(tokenizer, token_id)


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """A token as text; one that is no whole character as "bytes:\\xe2\\x82", which is OpenAI's way to write it."""
    raw = tokenizer.token_bytes(token_id)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
