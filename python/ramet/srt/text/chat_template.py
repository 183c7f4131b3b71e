"""Owns the rendering of a chat into a prompt by a model's Jinja template, as Hugging Face templates expect it.

Jinja is imported when the first chat is rendered.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ramet.srt.errors import RequestError

if TYPE_CHECKING:
    from jinja2 import Environment, Template


class ChatTemplate:
    """One template with the special tokens that it may name. It runs in a sandbox that can change nothing."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], origin: str):
        self.source = source
        self._special_tokens = dict(special_tokens)
        self._origin = origin

    def compile(self) -> None:
        """Find out now whether the template can be compiled.

        Raises:
            ValueError: if it can't; the message names the file and the line.
        """
        from jinja2 import TemplateSyntaxError

        try:
            _ = self._template
        except TemplateSyntaxError as error:
            raise ValueError(f"chat template in {self._origin}, line {error.lineno}: {error.message}") from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **template_kwargs: Any,
    ) -> str:
        """The prompt for `messages`, special tokens included: encode it without adding them again.

        Raises:
            RequestError: (a ValueError) if the template refuses the messages; with its own words.
        """
        from jinja2 import TemplateError

        self.compile()
        values = {
            "tools": None,
            "documents": None,
            **self._special_tokens,
            **template_kwargs,
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._template.render(values)
        except (
            TemplateError,
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
            ArithmeticError,
            RecursionError,
        ) as error:
            raise RequestError(f"the chat template refuses these messages: {error}", param="messages") from None

    @cached_property
    def _template(self) -> "Template":
        return _environment().from_string(self.source)


def _environment() -> "Environment":
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationBlock(Extension):
        """`{% generation %}…{% endgeneration %}` marks training targets; here its content is rendered as it is."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(pattern: str) -> str:
        return datetime.now().strftime(pattern)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment
