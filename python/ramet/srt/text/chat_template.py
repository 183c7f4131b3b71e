"""Owns a model's chat template: what it is given for a chat, and what its refusals become.

A template is a program that comes with a model. It runs in a process of its own (template_process.py), which bounds
what it can take.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ramet.srt.errors import RequestError
from ramet.srt.text.template_process import TemplateFailed, render_template


class ChatTemplate:
    """One template with the special tokens that it may name.

    Args:
        origin: the file that it comes from, for errors.
        tool_use: another template for chats with tools, where the model has one.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], origin: str, tool_use: str | None = None):
        self.source = source
        self._tool_use = tool_use
        self._special_tokens = dict(special_tokens)
        self._origin = origin

    @property
    def whole_source(self) -> str:
        """The texts of all of it, for who looks for marks."""
        return "\n".join(filter(None, (self.source, self._tool_use)))

    def compile(self) -> None:
        """Find out now whether the template can be compiled.

        Raises:
            ValueError: if it can't; the message names the file and the line.
        """
        for source in filter(None, (self.source, self._tool_use)):
            try:
                render_template(source, None)
            except TemplateFailed as error:
                raise self._compile_error(error) from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **template_kwargs: Any,
    ) -> str:
        """The prompt for `messages`, special tokens included: encode it without adding them again.

        Args:
            continue_final_message: end in the last message's text instead of behind it; without a generation prompt.

        Raises:
            RequestError: (a ValueError) if the template refuses the messages, with its own words; or if it takes more
                time or memory than a template may.
            ServiceError: if there is no process to run it in.
        """
        is_tool_use = self._tool_use is not None and template_kwargs.get("tools") is not None
        source = self._tool_use if self._tool_use is not None and is_tool_use else self.source
        values = {
            "tools": None,
            "documents": None,
            **self._special_tokens,
            **template_kwargs,
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
        }
        try:
            return render_template(source, values, continue_final_message)
        except TemplateFailed as error:
            if error.line is not None:
                raise self._compile_error(error) from None
            raise RequestError(f"the chat template {error}", param="messages") from None

    def _compile_error(self, error: TemplateFailed) -> ValueError:
        if error.line is None:
            return ValueError(f"chat template in {self._origin}: it {error}")
        return ValueError(f"chat template in {self._origin}, line {error.line}: {error}")
