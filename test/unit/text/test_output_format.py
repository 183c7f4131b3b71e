"""The parsers of an instance: chosen by name or by the template, put together, fed with special tokens or without."""

from typing import Any

import pytest
from ramet.srt.configs.parser_config import ParserConfig
from ramet.srt.text.output_events import Content, Reasoning, ToolCallStart
from ramet.srt.text.output_format import OutputFormat, PromptEnd
from ramet.srt.text.reasoning.families import recognise_reasoning
from ramet.srt.text.tool_calls.families import FORMATS, recognise_tool_calls
from ramet.srt.text.tool_calls.tool import Tool
from tool_call_texts import TOOLS, WRITERS, deepseekv31, hermes, kimi_k2, make_tokenizer, parse


def make(tool_calls: str = "auto", reasoning: str = "auto", **tokenizer: Any) -> OutputFormat:
    config = ParserConfig(tool_call_parser=tool_calls, reasoning_parser=reasoning)
    return OutputFormat(make_tokenizer(**tokenizer), config)


# What tells templates apart, as the published ones have it.
@pytest.mark.parametrize(
    ("template", "tool_calls", "reasoning"),
    [
        ("", "none", "none"),
        ("{{ messages[0].content }}", "none", "none"),
        ('<tool_call>\\n{\\"name\\": <function-name>, \\"arguments\\": <args-json-object>}', "hermes", "none"),
        ('<tool_call>{"name": "x", "arguments": {}}</tool_call> <think>\n\n</think>', "hermes", "qwen3"),
        ("<tool_call>\n<function=example>\n<parameter=a>\n1\n</parameter>", "qwen3_coder", "none"),
        ("<seed:tool_call>\n<function=example>\n<parameter=a>", "none", "none"),
        ('<tool_call></tool_call> <tool_calls>[{"name": 1, "arguments": 2}]', "none", "none"),
        ("<tool_call>{name}\n<arg_key>{k}</arg_key> <think></think>", "glm45", "glm45"),
        ('{"name": function name, "parameters": dictionary of argument name and its value}', "llama3", "none"),
        ("[func_name1(params_name1=params_value1), func_name2(params)]", "pythonic", "none"),
        ("[TOOL_CALLS]", "mistral", "none"),
        ("<｜tool▁calls▁begin｜> ```json <｜Assistant｜> {% if '</think>' in content %}", "deepseekv3", "deepseek-r1"),
        ("<｜tool▁calls▁begin｜> <｜Assistant｜> <think></think>", "deepseekv31", "qwen3"),
        ("<|tool_calls_section_begin|>", "kimi_k2", "none"),
        ("<|tool_calls_section_begin|> <think></think>", "kimi_k2", "kimi"),
        ("◁think▷", "none", "kimi"),
        ("<|channel|>analysis functions.", "gpt-oss", "gpt-oss"),
    ],
)  # fmt: skip
def test_auto_goes_by_the_template(template: str, tool_calls: str, reasoning: str) -> None:
    assert (recognise_tool_calls(template), recognise_reasoning(template)) == (tool_calls, reasoning)
    output_format = make(template=template)
    assert (output_format.tool_call_parser, output_format.reasoning_parser) == (tool_calls, reasoning)
    assert make("none", "none", template=template).parses_tool_calls is False


def test_names_that_are_none() -> None:
    with pytest.raises(ValueError, match=r"--tool-call-parser must be one of auto, none, .*; got 'qwen4'"):
        make("qwen4")
    with pytest.raises(ValueError, match="--reasoning-parser must be one of auto"):
        make(reasoning="deep")
    with pytest.raises(ValueError, match="don't go together"):
        make("gpt-oss", "qwen3")
    with pytest.raises(ValueError, match="--tool-call-parser gpt-oss and --reasoning-parser qwen3 don't go together"):
        make("auto", "qwen3", template="<|channel|>analysis functions.")
    assert make("gpt-oss", "auto").reasoning_parser == "gpt-oss"
    assert make("gpt-oss", "none").reasoning_parser == "none"


def test_calls_in_reasoning_are_no_calls() -> None:
    text = f"<think>Maybe {hermes([('get', {})])}?</think>\n\n{hermes([('get', {'a': 1})])}"
    output = parse(make("hermes", "qwen3").parser(PromptEnd(), TOOLS), list(text))
    assert output.calls == [("get", {"a": 1})]
    assert output.reasoning.startswith("Maybe <tool_call>")
    assert output.content == ""


def test_without_tools_calls_are_content() -> None:
    text = hermes([("get", {})])
    assert parse(make("hermes", "none").parser(PromptEnd()), [text]).content == text


def test_reasoning_of_kimi_ends_where_calls_begin() -> None:
    text = f"<think>Hm. {kimi_k2([('get', {})])}"
    output = parse(make("kimi_k2", "kimi").parser(PromptEnd(), TOOLS), list(text))
    assert output.calls == [("get", {})]
    assert output.reasoning == "Hm."


def test_finish_reason() -> None:
    parser = make("hermes", "none").parser(PromptEnd(), TOOLS)
    parser.feed(hermes([("get", {})]))
    assert (parser.finish_reason("stop"), parser.finish_reason("length")) == ("tool_calls", "length")
    assert make("hermes").parser(PromptEnd(), TOOLS).finish_reason("stop") == "stop"


@pytest.mark.parametrize(
    ("name", "writer"),
    [(name, number) for name, writers in WRITERS.items() for number in range(len(writers))],
)
def test_a_call_that_is_cut_off_is_no_reason_to_run_it(name: str, writer: int) -> None:
    special = FORMATS[name].marks if name == "gpt-oss" else ()
    output_format = make(name, "none", special=special)
    whole = WRITERS[name][writer]([("get", {}), ("get_weather", {"city": "Paris", "days": 30})])
    for text, reason in ((whole, "tool_calls"), (whole[: whole.index("30") + 1], "stop")):
        parser = output_format.parser(PromptEnd(), TOOLS)
        assert parse(parser, [text]).starts
        assert parser.finish_reason("stop") == reason, text
        assert parser.finish_reason("length") == "length"


def test_reasoning_can_wait_for_its_end() -> None:
    parser = make("none", "qwen3").parser(PromptEnd(), stream_reasoning=False)
    assert parser.feed("<think>a") == parser.feed("b") == []
    assert parser.feed("</think>c") == [Reasoning("ab"), Content("c")]
    parser = make("none", "qwen3").parser(PromptEnd(), stream_reasoning=False)
    assert parser.feed("<think>a") == []
    assert parser.finish() == [Reasoning("a")]


def test_reasoning_that_is_not_separate_is_content_and_holds_no_calls() -> None:
    text = f"<think>{hermes([('get', {})])}</think>\n{hermes([('get', {})])}"
    output = parse(make("hermes", "qwen3").parser(PromptEnd(), TOOLS, separate_reasoning=False), list(text))
    assert output.content == f"<think>{hermes([('get', {})])}</think>\n"
    assert output.calls == [("get", {})]


def test_special_tokens_are_asked_for_only_where_they_are_needed() -> None:
    assert not make("hermes", "qwen3").needs_special_tokens(with_tools=True)
    marks = ("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<|end|>", "<|e")
    output_format = make("deepseekv31", "none", special=marks)
    assert output_format.needs_special_tokens(with_tools=True)
    assert not output_format.needs_special_tokens(with_tools=False)
    text = f"<|end|>a<|end|> <|e <|{deepseekv31([('get', {})])}<|end|>"
    hidden = output_format.parser(PromptEnd(), TOOLS)
    shown = output_format.parser(PromptEnd(), TOOLS, skip_special_tokens=False)
    for output in (parse(hidden, list(text)), parse(output_format.parser(PromptEnd(), TOOLS), [text])):
        assert output.content == "a  <|"
        assert output.calls == [("get", {})]
    assert parse(shown, list(text)).content == "<|end|>a<|end|> <|e <|<|end|>"


def test_harmony_is_one_format_of_both() -> None:
    text = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant to=functions.get<|channel|>commentary json"
    text += '<|message|>{"a": 1}'
    parser = make("gpt-oss", "gpt-oss").parser(PromptEnd(), TOOLS)
    events = parser.feed(text) + parser.finish()
    assert events[0] == Reasoning("Hm.")
    assert isinstance(events[1], ToolCallStart)
    assert parser.finish_reason("stop") == "tool_calls"
    alone = parse(make("none", "gpt-oss").parser(PromptEnd(), TOOLS), [text])
    assert alone.starts == []
    assert alone.content.endswith('{"a": 1}')
    assert "Hm." in parse(make("gpt-oss", "none").parser(PromptEnd(), TOOLS), [text]).content


def test_the_arguments_of_a_tool_are_those_that_it_lists() -> None:
    inner = {"type": "object", "properties": {"b": {"type": "integer"}}}
    shut = inner | {"additionalProperties": False}
    many = {
        "properties": {"a": inner, "c": {"type": "array", "items": inner}, "d": {"anyOf": [inner, {"type": "null"}]}}
    }
    assert Tool("f", many).schema == {
        "type": "object",
        "properties": {"a": shut, "c": {"type": "array", "items": shut}, "d": {"anyOf": [shut, {"type": "null"}]}},
        "additionalProperties": False,
    }
    for open_one in (
        {"type": "object", "properties": {"a": {}}, "additionalProperties": {"type": "string"}},
        {"type": "object", "properties": {"a": {}}, "anyOf": [{"required": ["a"]}, {"properties": {"b": {}}}]},
        {"type": "object", "properties": {"a": {"allOf": [inner, {"properties": {"c": {}}}]}}},
        {"type": "object"},
    ):
        assert Tool("f", open_one).schema == open_one
    assert Tool("f").schema == {"type": "object"}
