"""Compares what the gpt-oss parser reads with what the published openai-harmony reads from the same output's tokens.

    pip install openai-harmony
    TIKTOKEN_ENCODINGS_BASE=FOLDER PYTHONPATH=python:test python test/manual/compare_with_openai_harmony.py

FOLDER holds o200k_base.tiktoken, the vocabulary that openai-harmony downloads otherwise (the package bpe-openai has it,
as data/o200k_base.tiktoken.gz).
"""

import sys

from openai_harmony import Role, StreamableParser, load_harmony_encoding
from ramet.srt.text.tool_calls.harmony import HarmonyParser
from tool_call_texts import TOOLS, parse

NEXT = "<|end|><|start|>assistant"
THOUGHT = f"<|channel|>analysis<|message|>Weather {{is}} needed.\n{NEXT}"
ARGUMENTS = '<|message|>{"city": "São 植", "days": 3}<|call|>'
OUTPUTS = [
    f"{THOUGHT}<|channel|>commentary to=functions.get_weather <|constrain|>json{ARGUMENTS}",
    f"{THOUGHT} to=functions.get_weather<|channel|>commentary json{ARGUMENTS}",
    f" to=functions.get_weather<|channel|>commentary <|constrain|>json{ARGUMENTS}",
    f"<|channel|>commentary<|message|>I'll look.{NEXT}<|channel|>commentary to=functions.get_weather{ARGUMENTS}",
    "<|channel|>final<|message|> Hello\n there. <|return|>",
    f"{THOUGHT}<|channel|>analysis<|message|>So.{NEXT}<|channel|>final<|message|>Yes.<|return|>",
]


def reference(text: str) -> tuple[str, str, list[tuple[str, str]]]:
    """Reasoning, content and calls as openai-harmony reads them."""
    encoding = load_harmony_encoding("HarmonyGptOss")
    parser = StreamableParser(encoding, role=Role.ASSISTANT)
    for token_id in encoding.encode(text, allowed_special="all"):
        parser.process(token_id)
    messages = [(one.channel, one.recipient, "".join(part.text for part in one.content)) for one in parser.messages]
    reasoning = "\n".join(text for channel, _, text in messages if channel == "analysis")
    content = "\n".join(text for channel, to, text in messages if channel != "analysis" and not to)
    return reasoning, content, [(to.removeprefix("functions."), text) for _, to, text in messages if to]


def main() -> int:
    num_wrong = 0
    for text in OUTPUTS:
        output = parse(HarmonyParser(TOOLS), list(text))
        calls = [(start.name, given) for start, given in zip(output.starts, output.arguments, strict=True)]
        ours, theirs = (output.reasoning, output.content, calls), reference(text)
        print("equal" if ours == theirs else f"DIFFERENT: {ours} and {theirs}", repr(text))
        num_wrong += ours != theirs
    return 1 if num_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
