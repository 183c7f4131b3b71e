"""Parsers of reasoning: where it begins and ends, also in the prompt, and the same result for every way of cutting."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ramet.srt.configs.parser_config import AUTO, NONE, REASONING_PARSERS
from ramet.srt.text.reasoning.families import FORMATS, HARMONY, PromptState
from ramet.srt.text.reasoning.think_parser import ThinkParser
from ramet.srt.text.tool_calls.harmony import HarmonyParser
from tool_call_texts import parse


def make(name: str, prompt: str = "", continued: str | None = None, separates: bool = True) -> ThinkParser:
    form = FORMATS[name]
    state, pair = form.prompt_state(prompt, continued)
    is_open = state is PromptState.OPEN
    return ThinkParser((pair,) if is_open else form.pairs, is_open, form.interrupts, separates)


def test_every_name_has_a_form() -> None:
    assert {*FORMATS, HARMONY} == set(REASONING_PARSERS) - {AUTO, NONE}


@pytest.mark.parametrize(
    ("name", "prompt", "text", "reasoning", "content"),
    [
        ("qwen3", "<|im_start|>assistant\n", "<think>\nHm.\n\nYes.\n</think>\n\nHello. ", "Hm.\n\nYes.", "Hello. "),
        ("qwen3", "assistant\n<think>\n", "Hm.\n</think>\n\nHello.", "Hm.", "Hello."),
        ("qwen3", "assistant\n<think>\n", "<think>\nHm.\n</think>\n\nHello.", "Hm.", "Hello."),
        ("qwen3", "assistant\n<think>\n\n</think>\n\n", "Hello.", "", "Hello."),
        ("qwen3", "assistant\n", "Hello <think>x</think>", "", "Hello <think>x</think>"),
        ("qwen3", "assistant\n", "  Hello.\n", "", "  Hello.\n"),
        ("qwen3", "assistant\n", "<think>\nHm. \n", "Hm. \n", ""),
        ("qwen3", "assistant\n", "<think>\n\n</think>\n\nHello.", "", "Hello."),
        ("qwen3", "assistant\n", "<think>a</think>b</think>c", "a", "b</think>c"),
        ("qwen3", "assistant\n", "<thin", "", "<thin"),
        ("qwen3", "assistant\n<think>\n", "a </thin> b </think", "a </thin> b </think", ""),
        ("deepseek-r1", "<｜Assistant｜>", "Hm.\n</think>\n\nHello.", "Hm.", "Hello."),
        ("deepseek-r1", "<｜Assistant｜>", "<think>\nHm.\n</think>\n\nHello.", "Hm.", "Hello."),
        ("deepseek-r1", "<｜Assistant｜></think>", "Hello.", "", "Hello."),
        ("deepseek-r1", "<｜Assistant｜><think>\n", "Hm.</think>Hello.", "Hm.", "Hello."),
        ("glm45", "<|assistant|>", "\n<think>Hm.</think>\nHello.", "Hm.", "Hello."),
        ("glm45", "<|assistant|>\n<think></think>", "\nHello.", "", "\nHello."),
        ("kimi", "<|im_middle|>", "<think>Hm.</think>Hello.", "Hm.", "Hello."),
        ("kimi", "<|im_middle|>", "◁think▷Hm.◁/think▷Hello.", "Hm.", "Hello."),
        ("kimi", "<|im_middle|>◁think▷", "Hm.◁/think▷Hello.", "Hm.", "Hello."),
        ("kimi", "", "<think>Hm. <|tool_calls_section_begin|>", "Hm.", "<|tool_calls_section_begin|>"),
    ],
)
def test_reasoning(name: str, prompt: str, text: str, reasoning: str, content: str) -> None:
    for pieces in ([text], list(text)):
        output = parse(make(name, prompt), pieces)
        assert (output.reasoning, output.content) == (reasoning, content)


@pytest.mark.parametrize(
    ("continued", "reasoning", "content"),
    [
        ("<think>\nI", " think.", "Yes."),
        ("<think>\nI think.</think>Y", "", " think.</think>Yes."),
        ("Of <think>", "", " think.</think>Yes."),
        ("", "", " think.</think>Yes."),
    ],
)
def test_an_output_that_continues_a_message(continued: str, reasoning: str, content: str) -> None:
    output = parse(make("qwen3", f"user: <think> assistant: {continued}", continued), [" think.</think>Yes."])
    assert (output.reasoning.lstrip(), output.content) == (reasoning.lstrip(), content)


@pytest.mark.parametrize("text", ["<think>\n a \n</think>\n\n b", "b", " \n<think>a", "<think></think>"])
@pytest.mark.parametrize("prompt", ["", "<think>\n"])
def test_without_separation_nothing_is_taken_out(text: str, prompt: str) -> None:
    output = parse(make("qwen3", prompt, separates=False), list(text))
    assert output.reasoning + output.content == text


@settings(max_examples=500, deadline=None)
@given(
    st.sampled_from(sorted(FORMATS)),
    st.sampled_from(["", "<think>\n", "</think>"]),
    st.booleans(),
    st.lists(st.sampled_from(["<think>", "</think>", "◁think▷", "◁/think▷", " ", "\n", "a", "<", "</th", "b."])),
    st.data(),
)
def test_cuts_make_no_difference(
    name: str, prompt: str, separates: bool, parts: list[str], data: st.DataObject
) -> None:
    text = "".join(parts)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    pieces = [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    output = parse(make(name, prompt, separates=separates), pieces)
    assert output == parse(make(name, prompt, separates=separates), [text])
    if not separates:
        assert output.reasoning + output.content == text


HARMONY_TEXT = (
    "<|channel|>analysis<|message|>Hm. {x}<|end|><|start|>assistant<|channel|>commentary<|message|>Look:<|end|>"
    "<|start|>assistant<|channel|>analysis<|message|>So.<|end|><|start|>assistant<|channel|>final<|message|> Yes.\n"
)


@pytest.mark.parametrize("end", ["", "<|return|>", "<|end|>"])
def test_channels_of_harmony(end: str) -> None:
    for pieces in ([HARMONY_TEXT + end], list(HARMONY_TEXT + end)):
        output = parse(HarmonyParser([]), pieces)
        assert output.reasoning == "Hm. {x}\nSo."
        assert output.content == "Look:\n Yes.\n"


def test_reasoning_of_harmony_can_stay_content() -> None:
    output = parse(HarmonyParser([], separates=False), [HARMONY_TEXT])
    assert output.reasoning == ""
    assert output.content.startswith("<|channel|>analysis<|message|>Hm. {x}<|end|>")
    assert output.content.endswith("<|end|>\n Yes.\n")
