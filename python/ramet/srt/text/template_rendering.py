"""Owns the rendering of a chat by a Jinja template, as Hugging Face templates expect it and transformers 5 does it.

Only the process that renders imports this: see template_worker.py.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from ramet.srt.text.template_content import iterates_over_content

__all__ = ["Template", "TemplateSyntaxError"]

# transformers' own mark, which some templates look for. Templates that strip a message strip the space at its end.
END_MARK = "CONTINUE_FINAL_MESSAGE_TAG "
REASONING_NAMES = ("reasoning_content", "thinking", "reasoning")


class Template:
    """A compiled template.

    Raises:
        TemplateSyntaxError: if it can't be compiled.
    """

    def __init__(self, source: str):
        environment = make_environment()
        self._template = environment.from_string(source)
        self._source = source
        self._wants_parts = iterates_over_content(environment.parse(source))

    def render(self, values: Mapping[str, Any], continue_final_message: bool = False) -> str:
        """The prompt for `values["messages"]`; to `continue_final_message`, it ends in the last one's text.

        Contents that are lists of parts stay lists for templates that go through them, and become texts for others.
        A message with calls and without a content has an empty one for templates that can't do without.

        Raises:
            Exception: whatever the template raises.
        """
        messages = [prepare_message(message) for message in values["messages"]]
        text, error = None, None
        try:
            text = self._render_contents(values, messages, continue_final_message)
        except (TemplateError, TypeError, AttributeError) as caught:
            error = caught
        if text is None or not _shows_calls(messages, text):
            text = self._render_calls(values, messages, continue_final_message, text)
        if text is not None:
            return text
        assert error is not None
        raise error

    def _render_calls(
        self, values: Mapping[str, Any], messages: list[dict[str, Any]], continue_final_message: bool, text: str | None
    ) -> str | None:
        """The prompt with calls in other forms that templates are written for, the first that shows the calls.

        That is without any content "" or None, and with the arguments as an object or as JSON.

        Args:
            text: the prompt to take if none does; without one it is the first that the template takes, if any.
        """
        without_calls = [{"content": "", **_without_calls(message)} for message in messages]
        shown = self._try_contents(values, without_calls, continue_final_message) or ""  # names in the list of tools
        for write in (lambda arguments: arguments, as_json):
            for content in ("", None):
                others = [_with_calls(message, content, write) for message in messages]
                other = None if others == messages else self._try_contents(values, others, continue_final_message)
                if other is not None and _shows_calls(messages, other, shown):
                    return other
                text = other if text is None else text
        return text

    def _try_contents(
        self, values: Mapping[str, Any], messages: list[dict[str, Any]], continue_final_message: bool
    ) -> str | None:
        try:
            return self._render_contents(values, messages, continue_final_message)
        except (TemplateError, TypeError, AttributeError):
            return None

    def _render_contents(
        self, values: Mapping[str, Any], messages: list[dict[str, Any]], continue_final_message: bool
    ) -> str:
        if not any(isinstance(message.get("content"), list) for message in messages):
            return self._render(values, messages, continue_final_message)
        joined = [with_joined_content(message) for message in messages]
        if not self._wants_parts:
            return self._render(values, joined, continue_final_message)
        try:
            text = self._render(values, messages, continue_final_message)
        except (TemplateError, TypeError, AttributeError):  # a list for some roles, not for others
            return self._render(values, joined, continue_final_message)
        if _shows_parts(messages, text):
            return text
        try:
            other = self._render(values, joined, continue_final_message)
        except (TemplateError, TypeError, AttributeError):
            return text
        return other if _shows_parts(messages, other) else text

    def _render(self, values: Mapping[str, Any], messages: list[dict[str, Any]], continue_final_message: bool) -> str:
        if not continue_final_message:
            return self._template.render({**values, "messages": messages})
        final, final_text = with_end_mark(messages[-1] if messages else {})
        text = self._template.render({**values, "messages": [*messages[:-1], final]})
        mark = END_MARK.strip()
        if mark not in text or final_text.strip() not in text:
            raise TemplateError("the final message can't be continued: the template does not show all of its text")
        place = text.rindex(mark)
        # Where the space is gone the template strips messages: then the text ends without spaces, too.
        return text[:place] if text.startswith(END_MARK, place) else text[:place].rstrip()


def _shows_calls(messages: list[dict[str, Any]], text: str, others: str = "") -> bool:
    """Whether the prompt has the names of all functions that were called, as often as that and as they are in others.

    Without `others` once is enough: the names may be those of the listed tools.
    """
    calls = [call for message in messages for call in message.get("tool_calls") or () if isinstance(call, Mapping)]
    functions = [call["function"] for call in calls if isinstance(call.get("function"), Mapping)]
    times = Counter(str(function.get("name", "")) for function in functions)
    return all(text.count(name) >= others.count(name) + (num if others else 1) for name, num in times.items())


def _without_calls(message: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in message.items() if name != "tool_calls"}


def _with_calls(message: dict[str, Any], content: str | None, write: Callable[[Any], Any]) -> dict[str, Any]:
    """The message with another content if it has calls and no content, and with arguments as `write` gives them."""
    if not isinstance(message.get("tool_calls"), list):
        return message
    calls = [
        {**call, "function": {**call["function"], "arguments": write(call["function"].get("arguments", {}))}}
        if isinstance(call, Mapping) and isinstance(call.get("function"), Mapping)
        else call
        for call in message["tool_calls"]
    ]
    return {**message, "content": message.get("content") or content, "tool_calls": calls}


def as_json(arguments: Any) -> str:
    """The arguments of a call as OpenAI's API has them."""
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _shows_parts(messages: list[dict[str, Any]], text: str) -> bool:
    """Whether the prompt has the texts of all parts, and no list as Python writes it."""
    contents = [message["content"] for message in messages if isinstance(message.get("content"), list)]
    parts = [part for content in contents for part in content if part.get("type") == "text"]
    return all(part["text"].strip() in text for part in parts) and not any(str(part) in text for part in parts)


def prepare_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as templates expect it: nothing that is None, arguments of tool calls as objects.

    Raises:
        ValueError: if the arguments are no JSON object.
    """
    prepared = {name: value for name, value in message.items() if value is not None}
    reasoning = next((prepared[name] for name in REASONING_NAMES if name in prepared), None)
    if reasoning is not None:
        prepared = {"thinking": reasoning, **prepared, "reasoning_content": reasoning}
    if isinstance(prepared.get("tool_calls"), list):
        prepared["tool_calls"] = [_prepare_tool_call(call) for call in prepared["tool_calls"]]
    return prepared


def _prepare_tool_call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    text = function["arguments"]
    try:
        arguments = json.loads(text) if text.strip() else {}
    except ValueError as error:
        raise ValueError(f"{_describe_arguments(call)} must be JSON: {error}") from None
    if not isinstance(arguments, dict):
        raise ValueError(f"{_describe_arguments(call)} must be a JSON object")
    return {**call, "function": {**function, "arguments": arguments}}


def _describe_arguments(call: Mapping[str, Any]) -> str:
    """The call by its id, which is the client's own word for it: messages may have other places in the request."""
    return f"the arguments of the tool call {call.get('id')!r:.80} of {call['function'].get('name')!r:.80}"


def with_joined_content(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its text parts as one text."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {**message, "content": "\n".join(part["text"] for part in content if part.get("type") == "text")}


def with_end_mark(message: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The message with END_MARK behind its last text, and that text.

    Raises:
        TemplateError: if it has no text.
    """
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": content + END_MARK}, content
    parts = list(content) if isinstance(content, list) else []
    for place, part in reversed(list(enumerate(parts))):
        if "text" in part:
            parts[place] = {**part, "text": part["text"] + END_MARK}
            return {**message, "content": parts}, part["text"]
    raise TemplateError("the final message can't be continued: it has no text")


def make_environment() -> ImmutableSandboxedEnvironment:
    """What transformers gives to a template: a sandbox that can change nothing, and its helpers."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    environment.globals["namespace"] = PublicNamespace
    return environment


class GenerationBlock(Extension):
    """`{% generation %}…{% endgeneration %}` marks training targets; here its content is rendered as it is."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class PublicNamespace(Namespace):
    """A namespace without names that Python keeps for itself."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # as Jinja's: a template may call a name "self"
        self, values = args[0], dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"the name {name!r} of a namespace is unsafe: it begins with an underscore")


def raise_exception(message: str) -> None:
    """Refuse the messages, in the template's words."""
    raise TemplateError(message)


def strftime_now(pattern: str) -> str:
    """The time now, written by `pattern`."""
    return datetime.now().strftime(pattern)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers writes it: no HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
