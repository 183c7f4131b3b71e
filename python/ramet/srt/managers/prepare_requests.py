"""Owns the way from what a client asks for to requests that the scheduler can run: tokens, checks, defaults.

Pure functions: a long prompt can be prepared in a thread.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from ramet.srt.batch.batch_plan import Pooling
from ramet.srt.configs.sentence_transformers import EmbeddingConfig
from ramet.srt.errors import RequestError
from ramet.srt.managers.io_struct import TokenizedGenerateReqInput
from ramet.srt.sampling.constraint import constraint_of
from ramet.srt.sampling.sampling_params import GRAMMAR_FIELDS, MIN_SEED, SamplingParams, is_unicode
from ramet.srt.text.tokenizer import Tokenizer

MAX_SEQUENCES_OF_REQUEST = 4096
MAX_LISTED_TOKENS_OF_REQUEST = 1 << 20  # allowed_token_ids, of all sequences together: each of them has its own
MAX_TOP_LOGPROBS = 128
SLOW_CHARS = 4096  # from here on the tokenizing is worth a thread
SLOW_IDS = 200_000  # and the checks
MAX_CHARS_PER_TOKEN = 256  # on average over a text; no vocabulary has such words only
PROBE_CHARS_PER_TOKEN = 8  # this much text for each token of the context seldom fits into it


@dataclass(kw_only=True)
class SequenceInput:
    """One prompt as a client gives it, `text` or `input_ids`, with validated parameters: `n` sequences."""

    text: str | None = None
    input_ids: list[int] | None = None
    add_special_tokens: bool = True
    sampling_params: SamplingParams = field(default_factory=SamplingParams)
    pooling: Pooling | None = None  # in place of generating
    fit_max_new_tokens: bool = False  # max_new_tokens is a default: lower it to what the context has room for
    return_logprob: bool = False
    logprob_start_len: int = -1
    top_logprobs_num: int = 0
    stream: bool = False
    priority: int = 0
    lora_name: str = ""  # of the adapter to compute it with; empty: none
    grammar_before: str = ""  # see Constraint.before
    param: str = "text"  # what the client calls the prompt, for errors


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the model and its scheduler allow."""

    vocab_size: int
    max_req_len: int  # prompt plus output, in tokens
    has_eos: bool
    grammars: bool  # whether constrained output is there
    priorities: bool = True  # whether requests may have some
    request_templates: bool = False  # whether a request may bring its own chat template
    sampling_defaults: Mapping[str, Any] = field(default_factory=dict)  # the model's own
    embedding: EmbeddingConfig | None = None  # of a model that makes embeddings and nothing else
    hidden_size: int = 0  # numbers of a whole embedding


def is_slow(inputs: Sequence[SequenceInput]) -> bool:
    """Whether preparing these takes so long that others on the event loop would notice."""
    num_chars = sum(len(one.text) for one in inputs if one.text is not None)
    num_ids = sum(len(one.input_ids) for one in inputs if one.input_ids is not None)
    return num_chars > SLOW_CHARS or num_ids > SLOW_IDS or any(one.sampling_params.bad_words for one in inputs)


def prepare_requests(
    inputs: Sequence[SequenceInput], rid: str, tokenizer: Tokenizer, limits: Limits
) -> list[TokenizedGenerateReqInput]:
    """The sequences of one client request: `n` of each input, in order.

    They have the id `rid`, or if they are several `rid` with their number behind it.

    Raises:
        RequestError: that names what is wrong.
    """
    if sum(one.sampling_params.n for one in inputs) > MAX_SEQUENCES_OF_REQUEST:
        raise RequestError(f"a request may have at most {MAX_SEQUENCES_OF_REQUEST} sequences", param="n")
    num_listed = sum(one.sampling_params.n * len(one.sampling_params.allowed_token_ids) for one in inputs)
    if num_listed > MAX_LISTED_TOKENS_OF_REQUEST:
        raise RequestError(
            f"allowed_token_ids: the sequences of a request may have at most {MAX_LISTED_TOKENS_OF_REQUEST} together, "
            f"not {num_listed}",
            param="allowed_token_ids",
        )
    bad_words = BadWordsReader(tokenizer, limits.vocab_size)
    requests = [copy for one in inputs for copy in _copies(_prepare(one, tokenizer, limits, bad_words))]
    for number, request in enumerate(requests):
        request.rid = rid if len(requests) == 1 else f"{rid}_{number}"
    return requests


def check_task(pooling: Pooling | None, limits: Limits) -> None:
    """Raises RequestError where the model is not made for what is asked: for a text, an embedding or labels."""
    wants_embedding = pooling is not None and not pooling.label_token_ids
    if wants_embedding and limits.embedding is None:
        raise RequestError(
            "the model that is served generates text; an instance that makes embeddings is started with --is-embedding",
            param="model",
        )
    if limits.embedding is not None and not wants_embedding:
        raise RequestError(
            "the model that is served makes embeddings (/v1/embeddings): it has no output head to generate text or "
            "scores with",
            param="model",
        )


def _prepare(
    one: SequenceInput, tokenizer: Tokenizer, limits: Limits, bad_words: "BadWordsReader"
) -> TokenizedGenerateReqInput:
    check_task(one.pooling, limits)
    input_ids = _encode(one, tokenizer, limits) if one.input_ids is None else one.input_ids
    _check_prompt(one, input_ids, limits)
    _check_grammar(one, limits)
    if one.priority and not limits.priorities:
        raise RequestError(
            "priority: requests have priorities only with --schedule-policy priority; otherwise it must be 0",
            param="priority",
        )
    return TokenizedGenerateReqInput(
        rid="",
        input_ids=input_ids,
        sampling_params=_with_room(one, len(input_ids), limits) if one.pooling is None else SamplingParams(),
        stream=one.stream,
        return_logprob=one.return_logprob,
        logprob_start_len=one.logprob_start_len,
        top_logprobs_num=one.top_logprobs_num,
        priority=one.priority,
        lora_name=one.lora_name,
        grammar_before=one.grammar_before,
        bad_words_ids=bad_words.token_ids(one.sampling_params.bad_words),
        pooling=one.pooling,
    )


class BadWordsReader:
    """Makes tokens of bad words, once for the prompts of a request that have the same."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._words: Sequence[str] = ()
        self._token_ids: list[list[int]] = []  # of those

    def token_ids(self, words: Sequence[str]) -> list[list[int]]:
        """The ways to write the words: each at the beginning of a text, and behind a space."""
        if words != self._words:
            self._words, self._token_ids = words, self._read(words)
        return self._token_ids

    def _read(self, words: Sequence[str]) -> list[list[int]]:
        found: dict[tuple[int, ...], None] = {}
        for word in words:
            bare = word.lstrip() or word
            for text in (bare, f" {bare}"):
                ids = tuple(self._tokenizer.encode(text, add_special_tokens=False))
                if ids and max(ids) < self._vocab_size:
                    found[ids] = None
        return [list(ids) for ids in found]


def _encode(one: SequenceInput, tokenizer: Tokenizer, limits: Limits) -> list[int]:
    text = one.text or ""
    if not is_unicode(text):
        raise RequestError(f"{one.param} holds a lone surrogate, which is no text", param=one.param)
    num_probed = PROBE_CHARS_PER_TOKEN * limits.max_req_len
    if len(text) > 2 * num_probed:  # don't tokenize megabytes to find that they are too long
        num_tokens = len(tokenizer.encode(text[:num_probed], one.add_special_tokens))
        if num_tokens > limits.max_req_len:
            raise _too_long(one, f"more than {num_tokens}", limits)
    return tokenizer.encode(text, one.add_special_tokens)


def check_prompt_size(prompt: str | list[int], param: str, max_req_len: int, has_answer: bool = True) -> None:
    """Refuse without any tokenizing what can't fit. Raises RequestError, which calls the prompt `param`."""
    is_text = isinstance(prompt, str)
    if len(prompt) >= (max_req_len * MAX_CHARS_PER_TOKEN if is_text else max_req_len + (not has_answer)):
        num_tokens = f"more than {max_req_len}" if is_text else str(len(prompt))
        answer = " and an answer" if has_answer else ""
        raise RequestError(
            f"{param} has {num_tokens} tokens; the context of {max_req_len} tokens has no room for them{answer}",
            param=param,
            code="context_length_exceeded",
        )


def _check_prompt(one: SequenceInput, input_ids: list[int], limits: Limits) -> None:
    if not input_ids:
        raise RequestError(f"{one.param} must not be empty", param=one.param)
    if min(input_ids) < 0 or max(input_ids) >= limits.vocab_size:
        if one.input_ids is None:
            raise RequestError(
                f"{one.param} has a token of the tokenizer, {max(input_ids)}, that the model with its vocabulary of "
                f"{limits.vocab_size} tokens doesn't know",
                param=one.param,
            )
        raise RequestError(f"{one.param}: token ids must be in [0, {limits.vocab_size})", param=one.param)
    if len(input_ids) > limits.max_req_len - (one.pooling is None):
        raise _too_long(one, str(len(input_ids)), limits)
    if one.return_logprob and one.logprob_start_len > len(input_ids):
        raise RequestError(
            f"logprob_start_len is beyond the prompt's {len(input_ids)} tokens", param="logprob_start_len"
        )
    if one.top_logprobs_num > min(MAX_TOP_LOGPROBS, limits.vocab_size):
        raise RequestError(
            f"at most {min(MAX_TOP_LOGPROBS, limits.vocab_size)} top logprobs can be had", param="top_logprobs_num"
        )


def _too_long(one: SequenceInput, num_tokens: str, limits: Limits) -> RequestError:
    answer = "" if one.pooling is not None else " and an answer"
    return RequestError(
        f"{one.param} has {num_tokens} tokens; the context of {limits.max_req_len} tokens has no room for them{answer}",
        param=one.param,
        code="context_length_exceeded",
    )


def _check_grammar(one: SequenceInput, limits: Limits) -> None:
    name = _grammar_field(one.sampling_params)
    if name is None:
        return
    if not limits.grammars:
        raise RequestError(f"{name}: constrained output is off (--grammar-backend none)", param=name)
    if not limits.has_eos:
        raise RequestError(f"{name}: the model has no end-of-sequence token to end with", param=name)
    constraint_of(one.sampling_params, one.grammar_before)  # its length; the scheduler finds out if it can be compiled


def _grammar_field(params: SamplingParams) -> str | None:
    return next((name for name in GRAMMAR_FIELDS if getattr(params, name) is not None), None)


def _with_room(one: SequenceInput, num_prompt_tokens: int, limits: Limits) -> SamplingParams:
    """The parameters with a max_new_tokens that the context has room for."""
    params = one.sampling_params
    room = limits.max_req_len - num_prompt_tokens
    for name in ("min_new_tokens", "max_new_tokens"):
        wanted = getattr(params, name)
        if wanted > room and not (name == "max_new_tokens" and one.fit_max_new_tokens):
            raise RequestError(
                f"{name} is {wanted} and the prompt has {num_prompt_tokens} tokens: together more than the context of "
                f"{limits.max_req_len} tokens",
                param=name,
                code="context_length_exceeded",
            )
    if params.max_new_tokens <= room:
        return params
    return msgspec.structs.replace(params, max_new_tokens=room)


def _copies(request: TokenizedGenerateReqInput) -> list[TokenizedGenerateReqInput]:
    """The `n` sequences that the request asks for; a given seed becomes `n` seeds that follow each other."""
    params = request.sampling_params
    copies = []
    for number in range(params.n):
        seed = None if params.sampling_seed is None else _wrapped(params.sampling_seed + number)
        one = msgspec.structs.replace(params, n=1, sampling_seed=seed)
        copies.append(msgspec.structs.replace(request, sampling_params=one))
    return copies


def _wrapped(seed: int) -> int:
    """The seed as an int64: behind the largest comes the smallest."""
    return (seed - MIN_SEED) % (1 << 64) + MIN_SEED
