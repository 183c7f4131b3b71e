"""Owns what a family's format of tool calls must say: its parser, and the grammar of calls that it reads."""

from typing import ClassVar

from ramet.srt.text.tool_calls.lark import Lark
from ramet.srt.text.tool_calls.parser import ToolCallParser
from ramet.srt.text.tool_calls.tool import Tool


class ToolCallFormat:
    """How a family of models writes calls. One object serves all requests; `parser` makes a parser of one output.

    Args:
        template: the model's chat template, where a family's models differ.
    """

    parser: ClassVar[type[ToolCallParser]]
    marks: ClassVar[tuple[str, ...]]  # texts that may be special tokens, and must be in what is parsed
    trigger: ClassVar[str | None]  # the mark behind which nothing but calls comes; None: a call may begin without one
    is_sectioned: bool = False  # one trigger stands before all calls, not one before each
    between: str | None  # what stands between two calls, a line break or nothing for "\n"; None: there is one at most

    def __init__(self, template: str):
        self.template = template

    def call(self, lark: Lark, tool: Tool) -> str:
        """The expression of a call, behind its trigger if it has one of its own.

        Raises:
            ValueError: if the format can't be held to the tool's schema; the message names the tool.
        """
        raise NotImplementedError

    def section(self, lark: Lark, calls: str) -> str:  # noqa: ARG002 - for formats that write marks
        """The expression of everything behind the trigger of all calls, where they have one together.

        Args:
            calls: the expression of the calls.
        """
        return calls
