"""Owns how the messages of a chat become a prompt: by which template, with what beside them, and in which threads."""

import asyncio
import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.requests import Request

from ramet.srt.entrypoints.http.http_body import NUM_BODY_BYTES
from ramet.srt.entrypoints.openai.protocol import ChatMessage, ChatOptions
from ramet.srt.errors import RequestError
from ramet.srt.managers.tokenizer_manager import TokenizerManager
from ramet.srt.text.chat_template import ChatTemplate
from ramet.srt.text.template_process import SMALL_BYTES

TEMPLATE_OWN_NAMES = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "self"}
)
THINKING_SWITCHES = ("enable_thinking", "thinking")  # the names that templates have for it
# They only wait for other processes: these for those of small chats, which must not wait for large ones. A chat is less
# than six times as long on its way to a process as it is in the body.
RENDER_THREADS = {is_large: ThreadPoolExecutor(64, f"chat template {is_large=}") for is_large in (False, True)}
MAX_SMALL_BODY_BYTES = SMALL_BYTES // 6


def is_large_chat(request: Request) -> bool:
    """Whether the chat in this request's body is one of those that others don't wait for."""
    return request.scope.get(NUM_BODY_BYTES, 0) > MAX_SMALL_BODY_BYTES


def may_think(options: ChatOptions) -> bool:
    """Whether the request leaves it to the model to reason, or asks for it: neither a switch nor the effort is off."""
    extra = options.chat_template_kwargs or {}
    switches = [extra[name] for name in THINKING_SWITCHES if name in extra]
    return any(one is not False for one in switches) if switches else options.reasoning_effort != "none"


async def render_chat(
    manager: TokenizerManager,
    messages: Sequence[ChatMessage],
    options: ChatOptions,
    is_large: bool,
    with_tools: bool = True,
) -> str:
    """The prompt for `messages`, special tokens included.

    Args:
        with_tools: whether the template is shown the tools.

    Raises:
        RequestError: if the options contradict each other, or the template refuses the messages.
        ServiceError: if there is no process for it.
    """
    extra = dict(options.chat_template_kwargs or {})
    taken = TEMPLATE_OWN_NAMES.intersection(extra)
    if taken:
        raise RequestError(f"chat_template_kwargs can't set {sorted(taken)[0]!r}", param="chat_template_kwargs")
    if options.reasoning_effort is not None:
        extra.setdefault("reasoning_effort", options.reasoning_effort)
        if options.reasoning_effort == "none":
            for name in THINKING_SWITCHES:
                extra.setdefault(name, False)
    if options.tools and with_tools:
        extra["tools"] = [tool.model_dump(exclude_none=True) for tool in options.tools]
    continues = bool(options.continue_final_message)
    if continues and options.add_generation_prompt:
        raise RequestError(
            "add_generation_prompt begins a new message, continue_final_message does not: only one of them can be true",
            param="add_generation_prompt",
        )
    render = functools.partial(
        _template(manager, options).render,
        [_template_message(message) for message in messages],
        add_generation_prompt=options.add_generation_prompt is not False,
        continue_final_message=continues,
        **extra,
    )
    try:
        return await asyncio.get_running_loop().run_in_executor(RENDER_THREADS[is_large], render)
    except ValueError as error:
        if options.chat_template and not isinstance(error, RequestError):  # it can't be compiled
            raise RequestError(f"chat_template: {error}", param="chat_template") from None
        raise


def _template(manager: TokenizerManager, options: ChatOptions) -> ChatTemplate:
    """The model's, or that of the request where the operator takes such ones."""
    if options.chat_template:
        if not manager.limits.request_templates:
            raise RequestError(
                "chat_template: templates of requests are not taken here (--trust-request-chat-template)",
                param="chat_template",
            )
        return ChatTemplate(options.chat_template, manager.tokenizer.special_tokens, "the request")
    template = manager.tokenizer.chat_template
    if template is None:
        raise RequestError("the model has no chat template; start with --chat-template FILE", param="messages")
    return template


def _template_message(message: ChatMessage) -> dict[str, Any]:
    """A message as templates expect it, with "developer" by the name that they know."""
    fields = message.model_dump(exclude_none=True)
    if message.role == "developer":
        fields["role"] = "system"
    if not fields.get("tool_calls"):
        fields.pop("tool_calls", None)
    return fields
