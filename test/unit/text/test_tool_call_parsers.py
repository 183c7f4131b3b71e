"""Parsers of tool calls: every family's calls, what is no call, and the same result wherever the stream is cut."""

import json
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ramet.srt.configs.parser_config import AUTO, NONE, TOOL_CALL_PARSERS
from ramet.srt.text.output_events import Content, ToolCallArguments, ToolCallStart
from ramet.srt.text.tool_calls.families import FORMATS
from ramet.srt.text.tool_calls.parser import ToolCallParser
from tool_call_texts import TOOLS, WRITERS, Call, hermes, parse

WAYS = [pytest.param(name, write, id=f"{name}-{number}") for name, writes in WRITERS.items()
        for number, write in enumerate(writes)]  # fmt: skip
Writer = Callable[[Sequence[Call]], str]
FINAL = "<|channel|>final<|message|>"  # with which gpt-oss writes content


def make(name: str, **options: Any) -> ToolCallParser:
    return FORMATS[name]("").parser(TOOLS, **options)


def said(name: str, text: str) -> str:
    """Content as the family writes it in front of calls."""
    return f"<|channel|>commentary<|message|>{text}<|end|><|start|>assistant" if name == "gpt-oss" else text


CALLS: dict[str, list[Call]] = {
    "one": [("get_weather", {"city": "Paris"})],
    "no arguments": [("get", {})],
    "parallel": [("get_weather", {"city": "Paris"}), ("get", {}), ("get_weather", {"city": "Oslo", "days": 3})],
    "nested": [("get_weather", {"city": "x", "where": {"a": [1, {"b": [[]]}], "c": {}}, "units": ["C", "F"]})],
    "kinds": [("get_weather", {"city": "3", "days": -12, "exact": True, "note": None})],
    "unicode": [("get_weather", {"city": "São 植物 🌱"})],
    "signs": [("write-file", {"text": "a \"quoted\" \\ back\\slash, {brace} [x] 'y' </x> & (z)"})],
    "line breaks": [("write-file", {"text": "a\n\n  b\tc\n"})],
    "names with one beginning": [("get", {}), ("get_weather", {"city": "a"})],
}


def test_every_name_has_a_format() -> None:
    assert set(FORMATS) == set(TOOL_CALL_PARSERS) - {AUTO, NONE} == set(WRITERS)


@pytest.mark.parametrize("case", CALLS)
@pytest.mark.parametrize(("name", "write"), WAYS)
def test_calls(name: str, write: Writer, case: str) -> None:
    calls = [(tool.replace("-", "_"), arguments) for tool, arguments in CALLS[case]] if name == "pythonic" else (
        CALLS[case])  # fmt: skip
    tools = (
        [type(tool)(tool.name.replace("-", "_"), tool.parameters) for tool in TOOLS] if name == "pythonic" else TOOLS
    )
    text = write(calls)
    output = parse(FORMATS[name]("").parser(tools), [text])
    assert output.calls == calls
    assert output.content == ""
    assert parse(FORMATS[name]("").parser(tools), list(text)) == output, "letter by letter"


def test_without_a_mark_a_call_of_llama_is_one_only_at_the_beginning() -> None:
    call = WRITERS["llama3"][1](CALLS["one"])
    assert parse(make("llama3"), [call]).calls == CALLS["one"]
    assert parse(make("llama3"), [f"So: {call}"]).content == f"So: {call}"


@pytest.mark.parametrize(("name", "write"), [way for way in WAYS if way.id != "llama3-1"])
def test_content_before_calls(name: str, write: Writer) -> None:
    text = said(name, "I'll look <it> up [now]:\n\n") + write(CALLS["parallel"])
    output = parse(make(name), list(text))
    assert output.calls == CALLS["parallel"]
    assert output.content.rstrip() == "I'll look <it> up [now]:"


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("text", ["", " ", "Hello.", "  a < b [TOOL <tool [get <| {\n\n", "<tool_call", "[get_weather"])
def test_content_alone(name: str, text: str) -> None:
    before = FINAL if name == "gpt-oss" and text else ""
    output = parse(make(name), list(before + text))
    assert output.content == text
    assert output.starts == []


@pytest.mark.parametrize(("name", "write"), WAYS)
def test_an_unknown_function_is_content(name: str, write: Writer) -> None:
    text = write([("get_money", {"city": "Paris"})])
    output = parse(make(name), list(text))
    assert output.starts == []
    assert shown(output.content) == shown(text)


def shown(text: str) -> str:
    """The text without what ends a message of gpt-oss, which is no content."""
    return re.sub(r"<\|call\|>|<\|end\|>", "", text)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", "<tool_call>\nnot json\n</tool_call> and more"),
        ("hermes", '<tool_call>{"arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": 3, "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "get", "arguments": 3}</tool_call>'),
        ("hermes", '<tool_call>{"name": "get", "arguments": "[1]"}</tool_call>'),
        ("hermes", '<tool_call>{"name": "get" "arguments": {}}'),
        ("hermes", '<tool_call>{"name": ' + "1" * 5000 + "}"),
        ("hermes", '<tool_call>{"arguments": ' + "[" * 100_000),
        ("hermes", '<tool_call>{"name": "get'),
        ("hermes", "The <tool_call> tag"),
        ("qwen3_coder", "<tool_call>\n<function=get>\nnothing</function></tool_call>"),
        ("qwen3_coder", "<tool_call>\n<function get>"),
        ("qwen3_coder", "<function=get_weather"),
        ("glm45", "<tool_call>get\nnothing</tool_call>"),
        ("glm45", "<tool_call>get_weather<arg_key>city</arg_key>Paris"),
        ("llama3", '{"a": 1, "name": "get"}'),
        ("llama3", '{"name": "Bob", "age": 3}'),
        ("llama3", "<|python_tag|>print(1)"),
        ("pythonic", "[get_weather(city=open('x'))]"),
        ("pythonic", "[get_weather('Paris')]"),
        ("pythonic", "[get_weather(city=1j)]"),
        ("pythonic", "[get_weather(city=" + "[" * 1000),
        ("pythonic", "[1] see [get] and [get_weather]"),
        ("pythonic", "[get_weather(city="),
        ("mistral", "[TOOL_CALLS] none"),
        ("mistral", "[TOOL_CALLS]get[ARGS]x"),
        ("mistral", '[TOOL_CALLS][{"name": "get"'),
        ("deepseekv3", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get<｜tool▁sep｜>"),
        ("deepseekv31", "<｜tool▁calls▁begin｜>nothing<｜tool▁calls▁end｜>"),
        ("deepseekv31", "<｜tool▁calls▁begin｜>"),
        ("kimi_k2", "<|tool_calls_section_begin|><|tool_call_begin|>functions.get:x<|tool_call_argument_begin|>{}"),
        ("gpt-oss", "<|channel|>commentary to=functions.get<|message|>text"),
        ("gpt-oss", "<|channel|>thoughts<|message|>text"),
        ("gpt-oss", "<|channel|>final without an end"),
    ],
)
def test_what_is_malformed_is_content(name: str, text: str) -> None:
    output = parse(make(name), [text])
    assert output.starts == []
    assert output.content == text
    if len(text) < 10_000:
        assert parse(make(name), list(text)) == output


@pytest.mark.parametrize(
    ("name", "text", "arguments", "content"),
    [
        ("hermes", '<tool_call>{"name": "get", "arguments": {"a": 1, oops}}</tool_call>', '{"a": 1, ',
         "oops}}</tool_call>"),
        ("hermes", '<tool_call>{"name": "get", "arguments": {"a": 01}}', '{"a": 01', "}}"),
        ("hermes", '<tool_call>{"name": "get", "arguments": {}} x </tool_call>', "{}", "x </tool_call>"),
        ("qwen3_coder", "<function=get_weather><parameter=city>Paris</parameter> and", '{"city": "Paris"', " and"),
        ("glm45", "<tool_call>get_weather<arg_key>city</arg_key><arg_value>a</arg_value>?", '{"city": "a"', "?"),
        ("pythonic", "[get_weather(city='a') or", '{"city": "a"}', " or"),
        ("mistral", '[TOOL_CALLS]get[ARGS]{"a": tru?}', '{"a": tru', "?}"),
    ],
)  # fmt: skip
def test_a_call_that_breaks_off_goes_on_as_content(name: str, text: str, arguments: str, content: str) -> None:
    output = parse(make(name), [text])
    assert output.arguments == [arguments]
    assert output.content == content
    assert parse(make(name), list(text)) == output


@pytest.mark.parametrize(("name", "write"), WAYS)
def test_an_output_that_is_cut_off_ends_in_its_arguments(name: str, write: Writer) -> None:
    text = write([("get_weather", {"city": "Paris, a long name"})])
    cut = text[: text.index("a long") + 1]
    output = parse(make(name), list(cut))
    if name == "pythonic":  # its arguments come when they are complete
        assert output.content == cut
    else:
        assert output.arguments == ['{"city": "Paris, a']
        assert output.content == ""


def test_arguments_in_other_forms() -> None:
    def arguments(written: str) -> list[Any]:
        output = parse(make("hermes"), [f"<tool_call>{written}</tool_call>"])
        assert output.content == ""
        return [json.loads(text) for text in output.arguments]

    assert arguments('{"name": "get"}') == [{}]
    assert arguments('{"name": "get", "arguments": null}') == [{}]
    assert arguments('{"arguments": {"a": 1}, "name": "get"}') == [{"a": 1}], "the name comes last"
    assert arguments('{"name": "get", "arguments": "{\\"a\\": \\"é\\"}"}') == [{"a": "é"}], "JSON in a string"
    assert arguments('{"name": "get", "arguments": ""}') == [{}]
    assert arguments('{"name": "get", "arguments": "{\\"a\\": \\"\\ud800\\"}"}') == [{"a": "\ud800"}]
    assert arguments('{"id": 7, "type": "function", "name": "get", "parameters": {}, "more": [1]}') == [{}]
    assert arguments('{"name": "get", "arguments": {"a": "x\ny"}}') == [{"a": "x\ny"}], "a line break as it is"


def test_arguments_come_as_they_are_written() -> None:
    parser = make("hermes")
    assert parser.feed('<tool_call>\n{"name": "get_weather", "arguments": ') == []
    start, arguments = parser.feed('{"city": "Pa')
    assert isinstance(start, ToolCallStart)
    assert (start.call_index, start.name) == (0, "get_weather")
    assert arguments == ToolCallArguments(0, '{"city": "Pa')
    assert parser.feed("ris") == [ToolCallArguments(0, "ris")]
    assert parser.feed('"}') == [ToolCallArguments(0, '"}')]
    assert parser.feed("}\n</tool_call>") == []


def test_a_long_string_comes_as_it_is_written_between_tags_too() -> None:
    parser = make("qwen3_coder")
    parser.feed("<tool_call>\n<function=write-file>\n<parameter=text>\n")
    assert parser.feed("def f():\n") == [ToolCallArguments(0, "def f():")]
    assert parser.feed("    x") == [ToolCallArguments(0, "\\n    x")]
    assert parser.feed("\n</parameter>\n</function>") == [ToolCallArguments(0, '"}')]


@pytest.mark.parametrize("name", FORMATS)
def test_nothing_is_held_back_that_can_be_no_mark(name: str) -> None:
    parser = make(name)
    if name == "gpt-oss":
        parser.feed(FINAL)
    for piece in ("Hello", " world,", " [a", "] <", "b> x", "{y}."):
        held = {"[", " <", " [a"}
        told = "".join(event.text for event in parser.feed(piece) if isinstance(event, Content))
        assert told or piece in held
    assert parser.finish() == []


def test_ids() -> None:
    assert re.fullmatch(r"call_[0-9a-f]{24}", parse(make("hermes"), [hermes(CALLS["one"])]).starts[0].id)
    new, old, given = (parse(make("mistral"), [write(CALLS["one"])]).starts[0].id for write in (
        WRITERS["mistral"][1], WRITERS["mistral"][0], WRITERS["mistral"][2]))  # fmt: skip
    assert re.fullmatch(r"[A-Za-z0-9]{9}", new) and re.fullmatch(r"[A-Za-z0-9]{9}", old)
    assert given == "a1B2c3D4e"
    kimi = parse(make("kimi_k2"), [WRITERS["kimi_k2"][0](CALLS["parallel"])])
    assert [start.id for start in kimi.starts] == [
        "functions.get_weather:0", "functions.get:1", "functions.get_weather:2"
    ]  # fmt: skip


def test_values_by_schema() -> None:
    def values(**texts: str) -> Any:
        body = "".join(f"<parameter={key}>{text}</parameter>" for key, text in texts.items())
        return parse(make("qwen3_coder"), [f"<function=get_weather>{body}</function>"]).calls[0][1]

    assert values(city="12") == {"city": "12"}, "a string, whatever it looks like"
    assert values(days=" 12 ", exact="True", units="['a', \"b\"]") == {"days": 12, "exact": True, "units": ["a", "b"]}
    assert values(days="many") == {"days": "many"}, "what is no such value stays as it is"
    assert values(note="null") == {"note": None}
    assert values(note="12") == {"note": "12"}
    assert values(unknown="12") == {"unknown": 12}
    assert values(where='{"a": true}') == {"where": {"a": True}}


def test_further_calls_than_there_may_be_are_content() -> None:
    text = hermes(CALLS["parallel"])
    output = parse(make("hermes", max_calls=1), [text])
    assert output.calls == CALLS["parallel"][:1]
    assert output.content.count("<tool_call>") == 2


def test_content_behind_and_between_calls() -> None:
    text = f"{hermes(CALLS['one'])}\nThen:\n{hermes(CALLS['one'])}\n\nDone. "
    output = parse(make("hermes"), [text])
    assert len(output.calls) == 2
    assert output.content == "Then:Done. "


# ---- all cuts ----

PIECES = [
    "<tool_call>", "</tool_call>", "\n", " ", "{", "}", '"name": ', '"get"', '"get_weather"', ", ",
    '"arguments": ', '"parameters": ', '{"city": "Paris", "days": 3}', "[TOOL_CALLS]", "[ARGS]",
    "[CALL_ID]", "[", "]", "get", "get_weather", "(", ")", "city=", "'a'", '"', "\\",
    "<function=get_weather>", "<parameter=city>", "</parameter>", "</function>", "<arg_key>city</arg_key>",
    "<arg_value>", "</arg_value>", "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "function",
    "<｜tool▁sep｜>", "```json\n", "```", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>",
    "<|tool_calls_section_begin|>", "<|tool_call_begin|>", "functions.get:0",
    "<|tool_call_argument_begin|>", "<|tool_call_end|>", ";", "<|tool_calls_section_end|>",
    "<|python_tag|>", "<|start|>assistant", "<|channel|>", "analysis", "final", "commentary",
    " to=functions.get", "<|message|>", "<|end|>", "<|call|>", "text", "é🌱", "<", "<|", "1", "true", "null",
    ":",
]  # fmt: skip


@st.composite
def outputs(draw: st.DrawFn) -> tuple[str, list[str]]:
    """An output, right or wrong, and its pieces."""
    name = draw(st.sampled_from(sorted(FORMATS)))
    if draw(st.booleans()):
        write = draw(st.sampled_from(WRITERS[name]))
        text = write(CALLS[draw(st.sampled_from(["one", "parallel", "kinds", "nested"]))])
        start = draw(st.integers(0, len(text)))  # with something else in the middle
        text = text[:start] + "".join(draw(st.lists(st.sampled_from(PIECES), max_size=2))) + text[start:]
    else:
        text = "".join(draw(st.lists(st.sampled_from(PIECES), max_size=25)))
    cuts = sorted(draw(st.sets(st.integers(0, len(text)), max_size=30)))
    pieces = [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    return name, pieces


@settings(max_examples=1500, deadline=None)
@given(outputs())
def test_cuts_make_no_difference(case: tuple[str, list[str]]) -> None:
    name, pieces = case
    text = "".join(pieces)
    whole = parse(make(name), [text])
    assert parse(make(name), pieces) == whole
    assert parse(make(name), list(text)) == whole


@settings(max_examples=500, deadline=None)
@given(outputs())
def test_nothing_is_made_up_or_told_twice(case: tuple[str, list[str]]) -> None:
    """All letters and digits of what is told come from the text, in order."""
    name, pieces = case
    text = "".join(pieces)
    parser = make(name)
    told = [event for piece in pieces for event in parser.feed(piece)] + parser.finish()
    written = re.sub(r"\\n|null|true|false", "", "".join(text_of(event) for event in told))  # JSON's own
    place = 0
    for letter in re.sub(r"[^a-zé🌱]", "", written):
        place = text.find(letter, place) + 1
        assert place > 0
    if not any(isinstance(event, ToolCallStart) for event in told) and name != "gpt-oss":
        assert "".join(event.text for event in told if isinstance(event, Content)) == text, "nothing is lost"


def text_of(event: Any) -> str:
    return "" if isinstance(event, ToolCallStart) else event.text


@pytest.mark.parametrize(
    "text",
    [
        hermes([("get", {})])[:12] * 60_000,
        '<tool_call>{"name": "get", "arguments": {"x": ' + "1" * 1_000_000 + "}}",
        " " * 500_000 + "x",
    ],
    ids=["beginnings", "digits", "spaces"],
)
def test_what_comes_at_once_takes_time_by_its_length(text: str) -> None:
    started = time.process_time()
    parse(make("hermes"), [text])
    assert time.process_time() - started < 2
