"""Grammars of calls and of answers behind reasoning: what they let through, and that parsers read what they make."""

import contextlib
import json
import random
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from ramet.srt.configs.parser_config import ParserConfig
from ramet.srt.sampling.constraint import Constraint
from ramet.srt.sampling.grammar import Grammar, GrammarCompiler
from ramet.srt.text.output_format import OutputFormat, PromptEnd
from ramet.srt.text.tool_calls.families import FORMATS
from ramet.srt.text.tool_calls.tool import Tool
from tool_call_texts import WRITERS, Call, hermes, make_tokenizer, parse

EOS = "</s>"
TOOLS = [
    Tool(
        "get_weather",
        {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer", "minimum": 1, "maximum": 7},
                "unit": {"enum": ["C", "F"]},
            },
            "required": ["city"],
            "additionalProperties": False,
        },
        strict=True,
    ),
    Tool("ping", {"type": "object", "properties": {}, "additionalProperties": False}, strict=True),
]
GOOD: list[Call] = [("get_weather", {"city": "Paris é", "days": 3, "unit": "C"})]
WRONG: list[tuple[str, Call]] = [
    ("a name that no tool has", ("get_money", {})),
    ("a value out of range", ("get_weather", {"city": "x", "days": 9})),
    ("a value that is none of them", ("get_weather", {"city": "x", "unit": "K"})),
    ("a missing parameter", ("get_weather", {"days": 3})),
    ("a parameter that there isn't", ("ping", {"x": 1})),
]
# Names of families with their marks as special tokens, and as ordinary text.
SPECIAL = {name: FORMATS[name].marks for name in FORMATS}
TEMPLATES = {"mistral-1": "[TOOL_CALLS] [ARGS]", "mistral-2": "[TOOL_CALLS] [CALL_ID] [ARGS]",
             }  # fmt: skip
WAYS = [(name, number) for name, writes in WRITERS.items() for number in range(len(writes)) if (name, number) not in (
    ("pythonic", 0), ("pythonic", 2))]  # fmt: skip


class Setting:
    """A tokenizer with some special tokens, its parsers, and its grammars."""

    def __init__(self, tool_calls: str, reasoning: str = "none", special: Sequence[str] = (), template: str = ""):
        self.tokenizer = make_tokenizer(template, [EOS, *special])
        self.eos = self.tokenizer.special_ids_by_text[EOS]
        self.compiler = GrammarCompiler(self.tokenizer, self.tokenizer.vocab_size, [self.eos])
        config = ParserConfig(tool_call_parser=tool_calls, reasoning_parser=reasoning)
        self.output_format = OutputFormat(self.tokenizer, config)

    def compile(self, lark: str | Constraint) -> Grammar:
        return self.compiler.compile(Constraint("ebnf", lark) if isinstance(lark, str) else lark)

    def behind(self, answer: Constraint, end: PromptEnd, tools: Sequence[Tool] = ()) -> Constraint:
        """The constraint on an output whose answer must keep to `answer`."""
        return answer._replace(before=self.output_format.grammar_before_answer(end, tools) or "")

    def accepts(self, lark: str | Constraint, text: str) -> bool:
        """Whether the text may be a whole output."""
        grammar = self.compile(lark)
        return all(grammar.accept(token_id) for token_id in [*self.tokenizer.encode(text, False), self.eos])

    def random_output(self, lark: str, seed: int) -> str | None:
        """An output of random tokens that the grammar allows; None if it did not end."""
        choose, grammar, ids = random.Random(seed), self.compile(lark), []
        for _ in range(1000):
            mask = np.unpackbits(np.frombuffer(grammar.mask(), np.uint8), bitorder="little")
            allowed = np.nonzero(mask)[0].tolist()
            quiet = [one for one in allowed if self.tokenizer.token_bytes(one).isascii()] or allowed
            marks = [one for one in allowed if one >= 256]  # which end texts
            ids.append(choose.choice(marks if marks and choose.random() < 0.3 else quiet))
            assert grammar.accept(ids[-1])
            if ids[-1] == self.eos or grammar.is_terminated:
                return self.tokenizer.decode([one for one in ids if one != self.eos])
        return None


def setting(name: str, number: int, is_special: bool) -> Setting:
    special = SPECIAL[name] if is_special or name == "gpt-oss" else ()
    return Setting(name, "none", special, TEMPLATES.get(f"{name}-{number}", "x"))


@pytest.mark.parametrize("is_special", [True, False])
@pytest.mark.parametrize(("name", "number"), WAYS)
def test_required_calls_are_held_to_format_and_schema(name: str, number: int, is_special: bool) -> None:
    one = setting(name, number, is_special)
    write = WRITERS[name][number]
    parallel = one.output_format.required_grammar(TOOLS, PromptEnd())
    single = one.output_format.required_grammar(TOOLS, PromptEnd(), is_parallel=False)
    assert one.accepts(parallel, ended(write(GOOD)))
    assert one.accepts(single, ended(write(GOOD)))
    assert one.accepts(parallel, ended(write([("ping", {})])))
    two = [*GOOD, ("ping", {}), *GOOD]
    assert one.accepts(parallel, ended(write(two))) is (name != "gpt-oss")
    assert not one.accepts(single, ended(write(two)))
    assert not one.accepts(parallel, "Hello.")
    assert not one.accepts(parallel, "")
    for reason, call in WRONG:
        assert not one.accepts(parallel, ended(write([call]))), reason


# As pydantic writes a model with a set of another model's objects in it, but for the titles.
PYDANTIC = Tool(
    "plan",
    {
        "type": "object",
        "properties": {
            "stops": {"type": "array", "items": {"$ref": "#/$defs/Stop"}, "uniqueItems": True},
            "cover": {"type": "object", "properties": {"file": {"type": "string", "format": "binary"}}},
        },
        "required": ["stops"],
        "additionalProperties": False,
        "$defs": {
            "Stop": {"type": "object", "properties": {"days": {"type": "integer", "maximum": 9}}, "required": ["days"]}
        },
    },
    strict=True,
)


@pytest.mark.parametrize(("name", "number"), WAYS)
def test_schemas_are_taken_as_pydantic_writes_them(name: str, number: int) -> None:
    one = setting(name, number, is_special=True)
    write = WRITERS[name][number]
    lark = one.output_format.required_grammar([PYDANTIC], PromptEnd())
    assert one.accepts(lark, ended(write([("plan", {"stops": [{"days": 3}], "cover": {"file": "x"}})])))
    assert not one.accepts(lark, ended(write([("plan", {"stops": [{"days": 30}]})])))
    assert not one.accepts(lark, ended(write([("plan", {"stops": ["x"]})])))


def ended(text: str) -> str:
    """gpt-oss ends a call with an end token, which the grammar leaves to the tokenizer."""
    return text.removesuffix("<|call|>")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("name", "number"), WAYS)
def test_parsers_read_what_grammars_make(name: str, number: int, seed: int) -> None:
    one = setting(name, number, is_special=seed % 2 == 0)
    lark = one.output_format.required_grammar(TOOLS, PromptEnd())
    text = next(filter(None, (one.random_output(lark, seed + 100 * attempt) for attempt in range(20))))
    output = parse(one.output_format.parser(PromptEnd(), TOOLS), list(text))
    assert output.content == "" or name == "gpt-oss"  # which may say something before
    assert output.calls
    for called, arguments in output.calls:
        assert called in ("get_weather", "ping")
        if called == "ping":
            assert arguments == {}
        else:
            assert isinstance(arguments["city"], str)
            assert 1 <= arguments.get("days", 1) <= 7
            assert arguments.get("unit", "C") in ("C", "F")


@pytest.mark.parametrize("is_special", [True, False])
@pytest.mark.parametrize(("name", "number"), [way for way in WAYS if FORMATS[way[0]].trigger is not None])
def test_free_output_is_held_to_schemas_of_strict_tools(name: str, number: int, is_special: bool) -> None:
    one = setting(name, number, is_special)
    write = WRITERS[name][number]
    lark = one.output_format.free_grammar(
        [*TOOLS, Tool("any", {"properties": {"a": {"type": "integer"}}})], PromptEnd()
    )
    assert lark is not None
    assert one.accepts(lark, "Hello <tool [TOOL {.")
    assert one.accepts(lark, "")
    assert one.accepts(lark, f"I'll look.\n{write([*GOOD, ('ping', {})])}")
    assert not one.accepts(lark, write([WRONG[1][1]]))
    assert not one.accepts(lark, f"Hm {write([('get_money', {})])}")
    assert one.accepts(lark, write([("any", {})]))
    if name not in ("qwen3_coder", "glm45"):
        assert one.accepts(lark, write([("any", {"a": "not held"})]))
    single = one.output_format.free_grammar(TOOLS, PromptEnd(), is_parallel=False)
    assert single is not None
    assert one.accepts(single, f"I'll look.\n{write(GOOD)}")
    assert not one.accepts(single, write([*GOOD, ("ping", {})]))


@pytest.mark.parametrize("name", ["llama3", "pythonic", "gpt-oss"])
def test_free_output_is_free_where_calls_begin_without_a_mark(name: str) -> None:
    assert setting(name, 0, True).output_format.free_grammar(TOOLS, PromptEnd()) is None


@pytest.mark.parametrize("special", [(), ("<think>", "</think>")])
def test_calls_come_behind_reasoning(special: tuple[str, ...]) -> None:
    one = Setting("hermes", "qwen3", special)
    free = one.output_format.required_grammar(TOOLS, PromptEnd(prompt="assistant\n"))
    opened = one.output_format.required_grammar(TOOLS, PromptEnd(prompt="assistant\n<think>\n"))
    closed = one.output_format.required_grammar(TOOLS, PromptEnd(prompt="<think>\n\n</think>\n\n"))
    call = hermes(GOOD)
    assert one.accepts(free, call)
    assert one.accepts(free, f"<think>\nHm {{ <tool_call>\n</think>\n\n{call}")
    assert not one.accepts(free, f"Hm </think>{call}")
    assert one.accepts(opened, f"Hm <tool_call> </think>\n\n{call}")
    assert not one.accepts(opened, call)
    assert one.accepts(closed, call)
    assert not one.accepts(closed, f"<think>\n</think>{call}")


@pytest.mark.parametrize("special", [(), ("<think>", "</think>")])
def test_who_wants_no_reasoning_gets_none_unless_the_prompt_has_opened_it(special: tuple[str, ...]) -> None:
    one = Setting("hermes", "qwen3", special)
    free = one.output_format.required_grammar(TOOLS, PromptEnd(prompt="assistant\n", may_think=False))
    opened = one.output_format.required_grammar(TOOLS, PromptEnd(prompt="assistant\n<think>\n", may_think=False))
    call = hermes(GOOD)
    assert one.accepts(free, call)
    assert not one.accepts(free, f"<think>\nHm\n</think>\n\n{call}")
    assert one.accepts(opened, f"Hm</think>\n\n{call}")
    answer = Constraint("regex", "[0-9]")
    assert one.behind(answer, PromptEnd(prompt="assistant\n", may_think=False)).before == ""
    assert one.behind(answer, PromptEnd(prompt="assistant\n<think>\n", may_think=False)).before


ANSWERS = [
    Constraint("json_schema", json.dumps({"type": "object", "properties": {"a": {"type": "integer"}},
                                          "required": ["a"], "additionalProperties": False})),
    Constraint("regex", r'\{"a": [0-9]/?\}'),
    Constraint("ebnf", 'root ::= "{\\"a\\": " [0-9] "}"'),
    Constraint("ebnf", 'start: "{\\"a\\": " DIGIT "}"\nDIGIT: /[0-9]/'),
]  # fmt: skip


@pytest.mark.parametrize("special", [(), ("<think>", "</think>")])
@pytest.mark.parametrize("answer", ANSWERS)
def test_an_answers_grammar_begins_behind_the_reasoning(answer: Constraint, special: tuple[str, ...]) -> None:
    one = Setting("none", "qwen3", special)
    right, wrong = '{"a": 1}', '{"b": 1}'
    free = one.behind(answer, PromptEnd(prompt="assistant\n"))
    assert one.accepts(free, right)
    assert one.accepts(free, f"<think>\nHm {wrong}\n</think>\n\n{right}")
    assert not one.accepts(free, f"<think>\nHm\n</think>\n\n{wrong}")
    assert not one.accepts(free, wrong)
    opened = one.behind(answer, PromptEnd(prompt="<think>\n"))
    assert one.accepts(opened, f"Hm {wrong}</think>{right}")
    assert not one.accepts(opened, right)
    closed = one.behind(answer, PromptEnd(prompt="<think></think>"))
    assert one.accepts(closed, f"\n{right}")
    assert not one.accepts(closed, wrong)


@pytest.mark.parametrize("answer", ANSWERS)
def test_without_reasoning_a_constraint_stays_as_it_is(answer: Constraint) -> None:
    assert Setting("hermes").behind(answer, PromptEnd()) == answer


@pytest.mark.parametrize("answer", ANSWERS)
def test_an_answers_grammar_is_in_harmonys_last_channel(answer: Constraint) -> None:
    one = Setting("gpt-oss", "gpt-oss", SPECIAL["gpt-oss"])
    constraint = one.behind(answer, PromptEnd())
    thought = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
    assert one.accepts(constraint, thought + '<|channel|>final<|message|>{"a": 1}')
    assert one.accepts(constraint, '<|channel|>final<|message|>{"a": 1}')
    assert not one.accepts(constraint, thought + '<|channel|>final<|message|>{"b": 1}')
    assert not one.accepts(constraint, '{"a": 1}')


@pytest.mark.parametrize("tool_calls", ["hermes", "mistral", "llama3", "gpt-oss"])
def test_calls_may_come_in_place_of_an_answer(tool_calls: str) -> None:
    one = Setting(tool_calls, "gpt-oss" if tool_calls == "gpt-oss" else "qwen3", SPECIAL[tool_calls])
    constraint = one.behind(ANSWERS[0], PromptEnd(), TOOLS)
    answer = "<|channel|>final<|message|>" if tool_calls == "gpt-oss" else ""
    assert one.accepts(constraint, answer + '{"a": 1}')
    assert one.accepts(constraint, WRITERS[tool_calls][0](GOOD).removesuffix("<|call|>"))  # which ends the output
    assert not one.accepts(constraint, answer + '{"b": 1}')
    assert not one.accepts(constraint, WRITERS[tool_calls][0]([WRONG[0][1]]))


# ---- values between tags ----


def tool_of(schema: Any, **more: Any) -> Tool:
    return Tool("f", {"type": "object", "properties": {"x": schema}, "required": ["x"], **more})


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        ({"type": "string"}, ["a", "", "a\nb <x> 'é'", "</parameter"], []),
        ({"type": "string", "maxLength": 3}, ["", "abc"], ["abcd"]),
        ({"type": "string", "minLength": 2}, ["ab", "é植x"], ["a"]),
        ({"type": "string", "pattern": "^[a-c/]+$"}, ["a/c"], ["d", "xa"]),
        ({"type": "string", "pattern": "b"}, ["b", "abc"], ["ac"]),
        ({"enum": ["on", "off"]}, ["on", "off"], ["o", "onoff", '"on"']),
        ({"const": "on"}, ["on"], ["off"]),
        ({"enum": [1, 2]}, ["1"], ["3"]),
        ({"type": "boolean"}, ["true", "false"], ["yes"]),
        ({"type": "number"}, ["1.5", "-2"], ["x"]),
        ({"type": "array", "items": {"type": "integer"}}, ["[1, 2]", "[]"], ["[x]"]),
        ({"anyOf": [{"enum": ["a", "b"]}, {"type": "null"}]}, ["a", "null"], ["c"]),
        ({"type": ["integer", "null"]}, ["3", "null"], ["x"]),
        ({}, ["anything", "1"], []),
    ],
)
def test_values_between_tags(schema: Any, right: list[str], wrong: list[str]) -> None:
    one = Setting("qwen3_coder")
    lark = one.output_format.required_grammar([tool_of(schema)], PromptEnd())
    for value in right + wrong:
        text = f"<tool_call>\n<function=f>\n<parameter=x>\n{value}\n</parameter>\n</function>\n</tool_call>"
        assert one.accepts(lark, text) is (value in right), value


def test_references_are_followed_between_tags() -> None:
    one = Setting("glm45", template="</arg_key><arg_value>")
    definitions = {"Kind": {"enum": ["a", "b"]}, "Item": {"type": "array", "items": {"$ref": "#/$defs/Number"}},
                   "Number": {"type": "integer"}}  # fmt: skip
    properties = {"kind": {"$ref": "#/$defs/Kind"}, "items": {"$ref": "#/$defs/Item"}}
    tool = Tool("f", {"type": "object", "properties": properties, "required": ["kind"], "$defs": definitions})
    lark = one.output_format.required_grammar([tool], PromptEnd())
    kind, items = (
        "<arg_key>kind</arg_key><arg_value>{}</arg_value>",
        "<arg_key>items</arg_key><arg_value>{}</arg_value>",
    )
    assert one.accepts(lark, f"<tool_call>f{kind.format('a')}{items.format('[1]')}</tool_call>")
    assert one.accepts(lark, f"<tool_call>f{kind.format('b')}</tool_call>")
    assert not one.accepts(lark, f"<tool_call>f{kind.format('c')}</tool_call>")
    assert not one.accepts(lark, f"<tool_call>f{kind.format('a')}{items.format('[x]')}</tool_call>")
    assert not one.accepts(lark, f"<tool_call>f{items.format('[1]')}</tool_call>")


@pytest.mark.parametrize(
    ("tool", "words"),
    [
        (tool_of({"type": "string", "pattern": "^a|b$"}), r"tool 'f', parameter 'x'.*'pattern'"),
        (tool_of({"type": "string", "not": {"const": "a"}}), r"tool 'f', parameter 'x'.*'not'"),
        (tool_of({"enum": ["a", 1]}), r"tool 'f', parameter 'x'.*'enum'"),
        (tool_of({"type": "string"}, minProperties=1), r"tool 'f'.*'minProperties'"),
        (tool_of({"type": "string", "pattern": 5}), r"tool 'f', parameter 'x': 'pattern' of its schema can't be 5"),
        (tool_of({"type": "string", "minLength": "1"}), r"tool 'f', parameter 'x': 'minLength' of its schema"),
        (tool_of({"type": "array", "items": {"$ref": "#"}}), r"tool 'f': a \$ref"),
        (tool_of({"type": "array", "items": {"$ref": "#/properties/y"}}), r"tool 'f': a \$ref"),
    ],
)
def test_what_cannot_be_held_is_refused(tool: Tool, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Setting("qwen3_coder").output_format.required_grammar([tool], PromptEnd())


def test_python_has_no_such_parameter_names() -> None:
    tool = Tool("f", {"type": "object", "properties": {"a-b": {"type": "string"}}})
    with pytest.raises(ValueError, match="'a-b' can't be the name of a parameter in Python"):
        Setting("pythonic").output_format.required_grammar([tool], PromptEnd())


def test_any_schema_goes_where_arguments_are_json() -> None:
    one = Setting("hermes")
    lark = one.output_format.required_grammar([tool_of({"type": "string", "pattern": "^a|b$"})], PromptEnd())
    assert one.accepts(lark, hermes([("f", {"x": "ab"})]))
    assert one.accepts(one.output_format.required_grammar([Tool("f")], PromptEnd()), hermes([("f", {"any": [1]})]))


SHARED = {"type": "array", "items": {"$ref": "#/$defs/A"}}


def circle(num_branches: int) -> dict[str, Any]:
    """A schema that leads to itself in many ways."""
    return {"anyOf": [{"$ref": "#/$defs/Circle"}] * num_branches}


@pytest.mark.parametrize(
    "tool",
    [
        tool_of({"$ref": "#/$defs/Circle"}, **{"$defs": {"Circle": circle(10)}}),
        tool_of({"type": "string", "pattern": "[" * 100_000}),
        tool_of({"type": "string", "pattern": "[" * 100_000 + "\\"}),
        Tool(
            "f",
            {"properties": {f"p{number}": SHARED for number in range(999)}, "$defs": {"A": {"enum": ["x" * 100_000]}}},
        ),
    ],
    ids=["circle", "classes", "open escape", "shared definitions"],
)
def test_a_schema_takes_no_longer_than_it_is_long(tool: Tool) -> None:
    started = time.process_time()
    with contextlib.suppress(ValueError):
        Setting("qwen3_coder").output_format.required_grammar([tool], PromptEnd())
    parse(FORMATS["qwen3_coder"]("").parser([tool]), [WRITERS["qwen3_coder"][0]([("f", {"x": 1})])])
    assert time.process_time() - started < 2


@pytest.mark.parametrize("schema", [{"type": {"a": 1}}, {"type": [{}]}, {"allOf": 5}, {"enum": 5}, {"anyOf": 1}, 3])
@pytest.mark.parametrize("name", ["qwen3_coder", "glm45", "pythonic", "hermes"])
def test_what_is_no_schema_breaks_no_parser(name: str, schema: Any) -> None:
    tool = Tool("f", {"properties": {"x": schema}, "required": 5})
    output = parse(FORMATS[name]("").parser([tool]), [WRITERS[name][0]([("f", {"x": "a"})])])
    assert output.calls == [("f", {"x": "a"})]
    with contextlib.suppress(ValueError):
        Setting(name).output_format.required_grammar([tool], PromptEnd())
