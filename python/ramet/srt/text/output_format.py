"""Owns how a model writes reasoning and tool calls: an instance's parsers, and grammars that hold a model to it."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from ramet.srt.configs.parser_config import AUTO, HARMONY, NONE, ParserConfig
from ramet.srt.text.output_parser import HiddenTokens, OutputParser
from ramet.srt.text.reasoning import families as reasoning_families
from ramet.srt.text.reasoning.families import PromptState, ReasoningFormat, recognise_reasoning
from ramet.srt.text.reasoning.think_parser import ThinkParser
from ramet.srt.text.tokenizer import Tokenizer
from ramet.srt.text.tool_calls import families as tool_call_families
from ramet.srt.text.tool_calls.families import recognise_tool_calls
from ramet.srt.text.tool_calls.format import ToolCallFormat
from ramet.srt.text.tool_calls.harmony import HarmonyFormat, HarmonyParser
from ramet.srt.text.tool_calls.lark import Lark, literal
from ramet.srt.text.tool_calls.parser import ToolCallParser
from ramet.srt.text.tool_calls.tool import Tool

ANSWER = "answer"  # the name by which a grammar of what comes before refers to the answer's


@dataclass(frozen=True, kw_only=True)
class PromptEnd:
    """What a parser must know of the prompt."""

    prompt: str = ""  # as text, or its end
    continued: str | None = None  # the final message's text, where the output is to continue it
    may_think: bool = True  # False: the request wants no reasoning; grammars have none unless the prompt opens it


class OutputFormat:
    """The parsers that an instance has, by the names `tool_call_parser` and `reasoning_parser`, "auto" resolved.

    Raises:
        ValueError: for an unknown name, and for two that don't go together.
    """

    def __init__(self, tokenizer: Tokenizer, config: ParserConfig):
        template = "" if tokenizer.chat_template is None else tokenizer.chat_template.whole_source
        self.tool_call_parser, self.reasoning_parser = _resolve(config, template)
        self._special_ids = tokenizer.special_ids_by_text
        self._harmony = HarmonyFormat(template)
        self._calls: ToolCallFormat | None = None
        if self.tool_call_parser != NONE:
            self._calls = tool_call_families.FORMATS[self.tool_call_parser](template)
        self._reasoning: ReasoningFormat | None = reasoning_families.FORMATS.get(self.reasoning_parser)
        self._hidden = {with_tools: self._hidden_marks(with_tools) for with_tools in (False, True)}

    @property
    def is_harmony(self) -> bool:
        """Whether calls and reasoning are messages of one format."""
        return HARMONY in (self.tool_call_parser, self.reasoning_parser)

    @property
    def parses_tool_calls(self) -> bool:
        """Whether tools can be served."""
        return self._calls is not None

    @property
    def parses_reasoning(self) -> bool:
        """Whether reasoning is told apart from the answer."""
        return self.reasoning_parser != NONE

    def needs_special_tokens(self, with_tools: bool) -> bool:
        """Whether a parser must get the texts of special tokens, with the requests' own `skip_special_tokens` false."""
        return any(mark in self._special_ids for mark in self._marks(with_tools))

    def parser(
        self,
        end: PromptEnd,
        tools: Sequence[Tool] = (),
        *,
        max_calls: int = sys.maxsize,
        separate_reasoning: bool = True,
        stream_reasoning: bool = True,
        skip_special_tokens: bool = True,
    ) -> OutputParser:
        """The parser of one output.

        Args:
            tools: those that may be called; without any, calls are content.
            max_calls: further ones are content.
            separate_reasoning: tell reasoning as such; otherwise it is content, with its marks.
            stream_reasoning: tell it as it comes; otherwise when it has ended.
            skip_special_tokens: as the request has it: whether to take those out that were needed for parsing alone.
        """
        with_tools = bool(tools) and self._calls is not None
        stages: list[ThinkParser | ToolCallParser] = []
        if self.is_harmony:
            separates = separate_reasoning and self.parses_reasoning
            stages = [HarmonyParser(tools if with_tools else (), separates=separates, max_calls=max_calls)]
        else:
            if self._reasoning is not None:
                stages.append(self._think_parser(self._reasoning, end, with_tools, separate_reasoning))
            if with_tools and self._calls is not None:
                stages.append(self._calls.parser(tools, max_calls=max_calls))
        hides = skip_special_tokens and self.needs_special_tokens(with_tools)
        return OutputParser(
            stages,
            self._hidden[with_tools] if hides else None,
            separate_reasoning=separate_reasoning,
            stream_reasoning=stream_reasoning,
        )

    def _think_parser(
        self, form: ReasoningFormat, end: PromptEnd, with_tools: bool, separate_reasoning: bool
    ) -> ThinkParser:
        state, pair = form.prompt_state(end.prompt, end.continued)
        pairs = (pair,) if state is PromptState.OPEN else form.pairs
        interrupts = form.interrupts if with_tools else ()
        return ThinkParser(pairs, state is PromptState.OPEN, interrupts, separate_reasoning)

    def _marks(self, with_tools: bool) -> list[str]:
        if self.is_harmony:
            return list(self._harmony.marks)
        calls = () if self._calls is None or not with_tools else self._calls.marks
        return [*(self._reasoning.marks if self._reasoning is not None else ()), *calls]

    def _hidden_marks(self, with_tools: bool) -> HiddenTokens:
        return HiddenTokens([text for text in self._special_ids if text not in self._marks(with_tools)])

    # ---- grammars ----

    def required_grammar(self, tools: Sequence[Tool], end: PromptEnd, *, is_parallel: bool = True) -> str:
        """A grammar, in Lark, of outputs that call one of `tools`, or if `is_parallel` some, after any reasoning.

        Raises:
            ValueError: if the format can't be held to a tool's schema; it names the tool.
        """
        lark = self._lark()
        calls = self._calls_expression(lark, tools, is_parallel)
        lark.rule("start", f"{self._before_answer(lark, end) or lark.space()} {calls}")
        return str(lark)

    def _calls_expression(self, lark: Lark, tools: Sequence[Tool], is_parallel: bool) -> str:
        """The expression of a call, or if `is_parallel` of some."""
        form = self._format_of_calls()
        call = self._call_rule(form, lark, tools)
        trigger = "" if form.trigger is None else lark.mark(form.trigger)
        unit = call if form.is_sectioned else f"{trigger} {call}"
        calls = f"{unit} ({self._between(lark, form)} {unit})*" if is_parallel and form.between is not None else unit
        return f"{trigger} {form.section(lark, calls)}" if form.is_sectioned else calls

    def free_grammar(self, tools: Sequence[Tool], end: PromptEnd, *, is_parallel: bool = True) -> str | None:
        """A grammar of outputs that are free until a call begins, and hold every call to its tool's schema.

        A tool that is not `strict` takes any arguments. None for formats in which a call begins without a mark.

        Raises:
            ValueError: as `required_grammar`.
        """
        form, lark = self._format_of_calls(), self._lark()
        if form.trigger is None:
            return None
        calls = self._call_rule(form, lark, [tool if tool.strict else Tool(tool.name) for tool in tools])
        if form.is_sectioned:
            calls = f"{calls} ({self._between(lark, form)} {calls})*" if is_parallel else calls
            calls = form.section(lark, calls)
        times = "*" if is_parallel and not form.is_sectioned else "?"
        rest = lark.text_without(form.trigger)
        unit = f"({lark.through(form.trigger, 'head')} {calls})"
        lark.rule("start", f"{self._before_answer(lark, end)} {unit}{times} {rest}")
        return str(lark)

    def grammar_before_answer(
        self, end: PromptEnd, tools: Sequence[Tool] = (), *, is_parallel: bool = True
    ) -> str | None:
        """A grammar of any reasoning and then @answer, which another grammar is; None where nothing can come before.

        Args:
            tools: those that may be called in place of the answer.

        Raises:
            ValueError: as `required_grammar`.
        """
        lark = self._lark()
        before, answer = self._before_answer(lark, end), f"@{ANSWER}"
        if self.is_harmony:
            before = f"{self._harmony.before(lark)}*"
            answer = f'{lark.mark("<|channel|>")} "final" {lark.mark("<|message|>")} {answer}'
        elif not before and not tools:
            return None
        if tools:
            answer = f"({self._calls_expression(lark, tools, is_parallel)} | {answer})"
        lark.rule("start", f"{before} {answer}")
        return str(lark)

    def _call_rule(self, form: ToolCallFormat, lark: Lark, tools: Sequence[Tool]) -> str:
        return lark.rule("call", " | ".join(f"({form.call(lark, tool)})" for tool in tools))

    def _between(self, lark: Lark, form: ToolCallFormat) -> str:
        return lark.line_break() if form.between == "\n" else literal(form.between or "")

    def _format_of_calls(self) -> ToolCallFormat:
        if self._calls is None:
            raise ValueError("this instance has no parser of tool calls")
        return self._calls

    def _lark(self) -> Lark:
        return Lark(self._special_ids.get)

    def _before_answer(self, lark: Lark, end: PromptEnd) -> str:
        """The expression of the reasoning that may come, "" if none can."""
        if self._reasoning is None:
            return ""
        state, pair = self._reasoning.prompt_state(end.prompt, end.continued)
        if state is PromptState.CLOSED:
            return lark.space()
        if state is PromptState.OPEN:
            return f"{lark.through(pair.end, 'thought')} {lark.space()}"
        if not end.may_think:
            return ""
        thoughts = [
            f"{lark.space()} {lark.mark(pair.begin)} {lark.through(pair.end, 'thought')} {lark.space()}"
            for pair in self._reasoning.pairs
        ]
        return f"({' | '.join(thoughts)})?"


def _resolve(config: ParserConfig, template: str) -> tuple[str, str]:
    """The names of the parsers of calls and of reasoning."""
    config.check()
    calls, reasoning = config.tool_call_parser, config.reasoning_parser
    if HARMONY in (calls, reasoning):  # the other one is it, too, or none
        return (HARMONY if calls == AUTO else calls), (HARMONY if reasoning == AUTO else reasoning)
    calls = recognise_tool_calls(template) if calls == AUTO else calls
    reasoning = recognise_reasoning(template) if reasoning == AUTO else reasoning
    ParserConfig(tool_call_parser=calls, reasoning_parser=reasoning).check()
    return calls, reasoning
