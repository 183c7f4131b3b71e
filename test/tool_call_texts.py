"""Writes calls as each family of models does, for the tests of its parser."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from ramet.srt.text.chat_template import ChatTemplate
from ramet.srt.text.output_events import Content, Event, Reasoning, ToolCallArguments, ToolCallStart
from ramet.srt.text.tokenizer import Tokenizer
from ramet.srt.text.tool_calls.tool import Tool
from tokenizers import Tokenizer as BackendTokenizer
from tokenizers import decoders, models, pre_tokenizers

Call = tuple[str, dict[str, Any]]

TOOLS = [
    Tool(
        "get_weather",
        {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer"},
                "units": {"type": "array", "items": {"type": "string"}},
                "where": {"type": "object"},
                "exact": {"type": "boolean"},
                "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            },
            "required": ["city"],
        },
    ),
    Tool("get", {"type": "object", "properties": {}}),
    Tool("write-file", {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}),
]


def dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def hermes(calls: Sequence[Call]) -> str:
    return "\n".join(
        f'<tool_call>\n{{"name": "{name}", "arguments": {dumps(arguments)}}}\n</tool_call>' for name, arguments in calls
    )


def as_text(value: Any) -> str:
    return value if isinstance(value, str) else dumps(value)


def qwen3_coder(calls: Sequence[Call]) -> str:
    blocks = []
    for name, arguments in calls:
        parameters = "".join(f"<parameter={key}>\n{as_text(value)}\n</parameter>\n" for key, value in arguments.items())
        blocks.append(f"<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>")
    return "\n".join(blocks)


def glm45(calls: Sequence[Call], line_break: str = "\n") -> str:
    blocks = []
    for name, arguments in calls:
        parameters = "".join(
            f"<arg_key>{key}</arg_key>{line_break}<arg_value>{as_text(value)}</arg_value>{line_break}"
            for key, value in arguments.items()
        )
        blocks.append(f"<tool_call>{name}{line_break}{parameters}</tool_call>")
    return line_break.join(blocks)


def llama3(calls: Sequence[Call]) -> str:
    return "<|python_tag|>" + "; ".join(
        f'{{"name": "{name}", "parameters": {dumps(arguments)}}}' for name, arguments in calls
    )


def pythonic(calls: Sequence[Call]) -> str:
    written = [f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"
               for name, arguments in calls]  # fmt: skip
    return f"[{', '.join(written)}]"


def pythonic_json(calls: Sequence[Call]) -> str:
    written = [f"{name}({', '.join(f'{key}={dumps(value)}' for key, value in arguments.items())})"
               for name, arguments in calls]  # fmt: skip
    return f"[{', '.join(written)}]"


def mistral(calls: Sequence[Call]) -> str:
    return "[TOOL_CALLS] " + dumps([{"name": name, "arguments": arguments} for name, arguments in calls])


def mistral_args(calls: Sequence[Call]) -> str:
    return "".join(f"[TOOL_CALLS]{name}[ARGS]{dumps(arguments)}" for name, arguments in calls)


def mistral_ids(calls: Sequence[Call]) -> str:
    return "".join(f"[TOOL_CALLS]{name}[CALL_ID]a1B2c3D4e[ARGS]{dumps(arguments)}" for name, arguments in calls)


def deepseekv3(calls: Sequence[Call]) -> str:
    written = "\n".join(
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{dumps(arguments)}\n```<｜tool▁call▁end｜>"
        for name, arguments in calls
    )
    return f"<｜tool▁calls▁begin｜>{written}<｜tool▁calls▁end｜>"


def deepseekv31(calls: Sequence[Call]) -> str:
    written = "".join(f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{dumps(arguments)}<｜tool▁call▁end｜>"
                      for name, arguments in calls)  # fmt: skip
    return f"<｜tool▁calls▁begin｜>{written}<｜tool▁calls▁end｜>"


def kimi_k2(calls: Sequence[Call]) -> str:
    written = "".join(
        f"<|tool_call_begin|>functions.{name}:{number}<|tool_call_argument_begin|>{dumps(arguments)}<|tool_call_end|>"
        for number, (name, arguments) in enumerate(calls)
    )
    return f"<|tool_calls_section_begin|>{written}<|tool_calls_section_end|>"


def harmony(calls: Sequence[Call]) -> str:
    return "<|start|>assistant".join(
        f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{dumps(arguments)}<|call|>"
        for name, arguments in calls
    )


# Name of a parser -> the ways in which its models write calls.
WRITERS: dict[str, list[Callable[[Sequence[Call]], str]]] = {
    "deepseekv3": [deepseekv3],
    "deepseekv31": [deepseekv31],
    "glm45": [glm45, lambda calls: glm45(calls, "")],
    "gpt-oss": [harmony],
    "hermes": [hermes],
    "kimi_k2": [kimi_k2],
    "llama3": [llama3, lambda calls: llama3(calls).removeprefix("<|python_tag|>")],
    "mistral": [mistral, mistral_args, mistral_ids],
    "pythonic": [pythonic, pythonic_json, lambda calls: f"<|python_start|>{pythonic(calls)}<|python_end|>"],
    "qwen": [hermes],
    "qwen25": [hermes],
    "qwen3_coder": [qwen3_coder],
}


def make_tokenizer(template: str = "", special: Sequence[str] = ("<|im_end|>",)) -> Tokenizer:
    """Byte-level, with an own token for each special text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = BackendTokenizer(models.BPE({sign: place for place, sign in enumerate(alphabet)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(list(special))
    chat_template = ChatTemplate(template, {}, "chat_template.jinja") if template else None
    return Tokenizer(backend, {}, chat_template)


class Output:
    """What events say together."""

    def __init__(self, events: Sequence[Event]):
        self.content = "".join(event.text for event in events if isinstance(event, Content))
        self.reasoning = "".join(event.text for event in events if isinstance(event, Reasoning))
        self.starts = [event for event in events if isinstance(event, ToolCallStart)]
        self.arguments = ["" for _ in self.starts]
        for event in events:
            if isinstance(event, ToolCallArguments):
                self.arguments[event.call_index] += event.text

    @property
    def calls(self) -> list[Call]:
        return [(start.name, json.loads(text)) for start, text in zip(self.starts, self.arguments, strict=True)]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Output) and self.as_tuple() == other.as_tuple()

    def as_tuple(self) -> tuple[Any, ...]:
        return self.content, self.reasoning, [start.name for start in self.starts], self.arguments

    def __repr__(self) -> str:
        return repr(self.as_tuple())


def parse(parser: Any, pieces: Sequence[str]) -> Output:
    events: list[Event] = []
    for piece in pieces:
        events += parser.feed(piece)
    events += parser.finish()
    assert all(event.text for event in events if isinstance(event, Content | Reasoning | ToolCallArguments))
    check_order(events)
    return Output(events)


def check_order(events: Sequence[Event]) -> None:
    """Calls begin in order, and arguments are those of the call that began last."""
    num_calls = 0
    for event in events:
        if isinstance(event, ToolCallStart):
            assert event.call_index == num_calls
            num_calls += 1
        elif isinstance(event, ToolCallArguments):
            assert event.call_index == num_calls - 1
