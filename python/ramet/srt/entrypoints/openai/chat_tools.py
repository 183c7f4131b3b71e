"""Owns what a chat says about tools: which may be called, whether one must be, and the grammar that sees to it."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from ramet.srt.entrypoints.openai.constraints import BodyConstraint
from ramet.srt.entrypoints.openai.protocol import ChatCompletionRequest, NamedTool, ToolSpec
from ramet.srt.errors import RequestError
from ramet.srt.text.output_format import OutputFormat, PromptEnd
from ramet.srt.text.tool_calls.tool import Tool


@dataclass(frozen=True)
class ChatTools:
    """The tools that may be called, none if none may; and whether one must be."""

    tools: Sequence[Tool] = ()
    must_call: bool = False
    is_parallel: bool = True

    @property
    def max_calls(self) -> int:
        """Of one output."""
        return sys.maxsize if self.is_parallel else 1


def tools_of(body: ChatCompletionRequest, form: OutputFormat) -> ChatTools:
    """What the body says.

    Raises:
        RequestError: if it contradicts itself, or the model's way to write calls is not known.
    """
    choice = body.tool_choice
    if not body.tools:
        if choice in (None, "none", "auto"):
            return ChatTools()
        raise RequestError("tool_choice: there are no tools to choose from", param="tool_choice")
    _check_tools(body.tools)
    if choice == "none":
        return ChatTools()
    if not form.parses_tool_calls:
        raise RequestError(
            "tools: how this model writes its calls is not known from its chat template; say it with "
            '--tool-call-parser, or send tool_choice: "none"',
            param="tools",
        )
    is_parallel = body.parallel_tool_calls is not False
    tools = [
        Tool(tool.function.name, tool.function.parameters or {}, bool(tool.function.strict)) for tool in body.tools
    ]
    if isinstance(choice, NamedTool):
        named = [tool for tool in tools if tool.name == choice.function.name]
        if not named:
            raise RequestError(
                f"tool_choice: there is no tool of the name {choice.function.name!r}", param="tool_choice"
            )
        return ChatTools(named, must_call=True, is_parallel=is_parallel)
    return ChatTools(tools, must_call=choice == "required", is_parallel=is_parallel)


def _check_tools(specs: Sequence[ToolSpec]) -> None:
    names = set()
    for spec in specs:
        name, parameters = spec.function.name, spec.function.parameters or {}
        if name in names:
            raise RequestError(f"tools: there are two of the name {name!r}", param="tools")
        names.add(name)
        kind = parameters.get("type", "object")
        if kind != "object":  # arguments are one
            raise RequestError(
                f'tools: the parameters of {name!r} must be a schema of the type "object", not {kind!r:.60}',
                param="tools",
            )


def constrain(
    tools: ChatTools, answer: BodyConstraint | None, form: OutputFormat, end: PromptEnd
) -> tuple[BodyConstraint | None, str]:
    """What the output must keep to: a constraint, and the grammar of what comes before it, "" for nothing.

    Args:
        answer: what the body wants of the answer; a call in its place need not be that.

    Raises:
        RequestError: if a tool's schema can't be kept to.
    """
    try:
        if tools.must_call:
            grammar = form.required_grammar(tools.tools, end, is_parallel=tools.is_parallel)
            return BodyConstraint("tools", "ebnf", grammar), ""
        if answer is not None:
            before = form.grammar_before_answer(end, tools.tools, is_parallel=tools.is_parallel)
            return answer, before or ""
        if any(tool.strict for tool in tools.tools):
            free = form.free_grammar(tools.tools, end, is_parallel=tools.is_parallel)
            return (None if free is None else BodyConstraint("tools", "ebnf", free)), ""
    except ValueError as error:
        raise RequestError(f"tools: {error}", param="tools") from None
    except RecursionError:
        raise RequestError("tools: a schema is nested too deeply", param="tools") from None
    return None, ""
