"""Owns the helper process that parses large bodies before the main process does, and says what is wrong with them.

It has no state, little memory and a low priority: a body that hurts it hurts nobody else.
"""

import contextlib
import json
import os
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
from pydantic import ValidationError

from ramet.srt.entrypoints.anthropic.conversion import chat_of, our_words
from ramet.srt.entrypoints.anthropic.protocol import Conversation, CountTokensRequest, MessagesRequest
from ramet.srt.entrypoints.generate_request import GenerateReqInput
from ramet.srt.entrypoints.http.body_check import LENGTH, BodyQuestion, BodyVerdict
from ramet.srt.entrypoints.http.http_validation import RequestBody
from ramet.srt.entrypoints.http.validation_words import describe_unreadable, describe_validation_errors
from ramet.srt.entrypoints.openai.pooling_protocol import (
    EmbeddingRequest,
    EncodeReqInput,
    PooledBody,
    RerankRequest,
    ScoreRequest,
)
from ramet.srt.entrypoints.openai.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from ramet.srt.entrypoints.openai.responses_protocol import InputTokensRequest, ResponsesRequest
from ramet.srt.errors import RequestError
from ramet.srt.managers.prepare_requests import Limits, check_prompt_size

MAX_MEMORY_BYTES = 2 << 30
FIRST_TO_BE_KILLED = "1000"  # where the kernel has to choose for want of memory: proc(5), oom_score_adj
NICENESS = 10
# Of parameters that hold values of any shape, as JSON.
MAX_FREE_BYTES = {
    "sampling_params": 2 << 20,
    "json_schema": 1 << 20,
    "response_format": 1 << 20,
    "guided_json": 1 << 20,
    "structured_outputs": 1 << 20,
    "chat_template_kwargs": 64 << 10,
    "tools": 4 << 20,
}
MAX_TEXT_CONFIG_BYTES = 1 << 20  # of a response's `text`, which has a JSON schema
BODIES: dict[str, type[RequestBody]] = {
    "/generate": GenerateReqInput,
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatCompletionRequest,
    "/tokenize": TokenizeRequest,
    "/v1/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
    "/v1/detokenize": DetokenizeRequest,
    "/v1/messages": MessagesRequest,
    "/v1/messages/count_tokens": CountTokensRequest,
    "/v1/responses": ResponsesRequest,
    "/v1/responses/input_tokens": InputTokensRequest,
    "/encode": EncodeReqInput,
    "/v1/embeddings": EmbeddingRequest,
    "/v1/score": ScoreRequest,
    **dict.fromkeys(("/v1/rerank", "/v2/rerank", "/rerank"), RerankRequest),
}


def main() -> None:
    """Answer questions from stdin on stdout until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(NICENESS)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(FIRST_TO_BE_KILLED)
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = MAX_MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(MAX_MEMORY_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    while answer_next(sys.stdin.buffer, sys.stdout.buffer):
        pass


def answer_next(source: BinaryIO, target: BinaryIO) -> bool:
    """Answer one question; False when there are no more."""
    head = source.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return False
    question = msgspec.msgpack.decode(source.read(LENGTH.unpack(head)[0]), type=BodyQuestion)
    body = source.read(question.num_bytes)
    if len(body) < question.num_bytes:
        return False
    verdict = look_at(question, body)
    # It quotes the client, whose strings may be no text.
    verdict.message, verdict.param = _as_text(verdict.message), _as_text(verdict.param)
    answer = msgspec.msgpack.encode(verdict)
    target.write(LENGTH.pack(len(answer)) + answer)
    target.flush()
    return True


def _as_text(quoted: str | None) -> str | None:
    return None if quoted is None else quoted.encode(errors="backslashreplace").decode()


def look_at(question: BodyQuestion, body: bytes) -> BodyVerdict:
    """What is wrong with a body. What is not told here the route itself will find: it looks again."""
    content, body_type = None, BODIES[question.path]
    try:
        content = json.loads(body)
        request = body_type.model_validate(content)
        if isinstance(request, Conversation):
            with our_words():
                _check(question, chat_of(request))
        else:
            _check(question, request)
    except ValidationError as error:
        message, name, code = describe_validation_errors(error.errors(include_url=False), content, body_type.foreign)
        return BodyVerdict(message=message, param=name, code=code)
    except RequestError as error:
        return BodyVerdict(message=str(error), param=error.param, code=error.code, status_code=error.status_code)
    except (ValueError, RecursionError, MemoryError) as error:
        return BodyVerdict(message=describe_unreadable(error))
    return BodyVerdict()


def _check(question: BodyQuestion, request: RequestBody) -> None:
    """Raises RequestError."""
    limits = Limits(vocab_size=question.vocab_size, max_req_len=question.max_req_len, has_eos=True, grammars=True)
    for param, prompt in _prompts(request, limits):
        check_prompt_size(prompt, param, question.max_req_len, has_answer=not isinstance(request, PooledBody))
    _check_free_values(request)


def _check_free_values(request: RequestBody) -> None:
    """Values of any shape are bounded in bytes. Raises RequestError."""
    limits = MAX_FREE_BYTES | ({"text": MAX_TEXT_CONFIG_BYTES} if isinstance(request, InputTokensRequest) else {})
    for name, max_bytes in limits.items():
        value = request.model_dump(include={name}).get(name)
        if value is not None and len(json.dumps(value)) > max_bytes:
            raise RequestError(f"{name} has more than {max_bytes} bytes", param=name)


def _prompts(request: RequestBody, limits: Limits) -> Iterator[tuple[str, str | list[int]]]:
    """The prompts of a body, with the parameter's name. Raises RequestError for sampling parameters that are wrong."""
    if isinstance(request, GenerateReqInput):
        for one in request.prompts():
            yield "text" if isinstance(one, str) else "input_ids", one
        request.sequence_inputs(limits)
    elif isinstance(request, PooledBody):
        yield from request.sized_prompts()
    elif isinstance(request, CompletionRequest):
        prompt: Any = request.prompt
        for one in [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt:
            yield "prompt", one
    elif isinstance(request, ChatCompletionRequest):
        for message in request.messages:
            content = message.content
            yield "messages", content if isinstance(content, str) else "".join(part.text for part in content or ())
            for call in getattr(message, "tool_calls", None) or ():
                arguments = call.function.arguments
                yield "messages", arguments if isinstance(arguments, str) else json.dumps(arguments)
    elif isinstance(request, InputTokensRequest):
        for text in request.texts():
            yield "input", text


if __name__ == "__main__":
    main()
