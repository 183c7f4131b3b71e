"""Chat templates: the helpers that Hugging Face templates expect, the sandbox, and refusals in the template's words."""

import re
from typing import Any

import pytest
from ramet.srt.errors import RequestError
from ramet.srt.text.chat_template import ChatTemplate

USER = [{"role": "user", "content": "hi"}]


def render(source: str, messages: Any = USER, **options: Any) -> str:
    return ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}, "model/chat_template.jinja").render(
        messages, **options
    )


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}", "<s>hi</s>"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "hi"}]'),
        ("{{ {'a': 'ä<'} | tojson }}", '{"a": "ä<"}'),
        ("{{ {'b': 1, 'a': 2} | tojson(indent=1) }}", '{\n "b": 1,\n "a": 2\n}'),
        ("a{% generation %}b{% endgeneration %}c", "abc"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% if tools %}x{% else %}y{% endif %}", "y"),
        ("{% if true %}\n  a\n{% endif %}", "  a\n"),
        ("{% if add_generation_prompt %}go{% endif %}", "go"),
    ],
)
def test_helpers(source: str, expected: str) -> None:
    assert render(source) == expected


def test_options() -> None:
    assert render("{{ enable_thinking }}", enable_thinking=False) == "False"
    assert render("{% if add_generation_prompt %}go{% endif %}", add_generation_prompt=False) == ""
    assert re.fullmatch(r"\d{4}-\d\d", render("{{ strftime_now('%Y-%m') }}"))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[5].content.x }}", "messages"),
        ("{{ 1 // 0 }}", "zero"),
        ("{{ messages[0].content + 1 }}", "str"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
    ],
)
def test_refusals_name_the_messages(source: str, words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        render(source)
    assert caught.value.param == "messages"


def test_broken_template_names_its_file_and_line() -> None:
    template = ChatTemplate("a\n{% if %}", {}, "model/chat_template.jinja")
    with pytest.raises(ValueError, match=r"model/chat_template\.jinja, line 2"):
        template.compile()


def test_what_is_none_is_not_there() -> None:
    source = "{% for m in messages %}{{ m | tojson }}{% if m.tool_calls is defined %}!{% endif %}{% endfor %}"
    assert render(source, [{"role": "user", "content": "x", "tool_calls": None}]) == '{"role": "user", "content": "x"}'


@pytest.mark.parametrize("arguments", ['{"cm": 3}', {"cm": 3}])
def test_arguments_of_calls_are_objects(arguments: Any) -> None:
    call = {"type": "function", "function": {"name": "grow", "arguments": arguments}}
    messages = [{"role": "assistant", "tool_calls": [call]}]
    assert render("{{ messages[0].tool_calls[0].function.arguments.items() | list }}", messages) == "[('cm', 3)]"


CALLS = [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "grow", "arguments": ""}}]}]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ 'x' + messages[0].content }}", "x"),
        ("{% if '</think>' in messages[0].content %}a{% else %}b{% endif %}", "b"),
        ("{{ 'content' in messages[0] }}", "False"),
        ("{% if messages[0].content is none %}{{ messages[0].tool_calls[0].function.name }}{% endif %}", "grow"),
        ("{{ messages[0].tool_calls[0].function.name + messages[0].tool_calls[0].function.arguments }}", "grow{}"),
        ("{% if messages[0].content is defined %}a{% endif %}{{ messages[0].tool_calls | length }}", "1"),
    ],
)
def test_calls_have_the_form_that_a_template_is_written_for(source: str, expected: str) -> None:
    assert render(source, CALLS) == expected


def test_calls_are_shown_beside_a_list_of_tools() -> None:
    source = (
        "{{ tools | tojson }}"
        "{% if messages[0].content is none %}{{ messages[0].tool_calls[0].function.name }}{% endif %}"
        "{% if messages[0].content is undefined %}{{ messages[0].content.x }}{% endif %}"
    )
    assert render(source, CALLS, tools=[{"name": "grow"}]).count("grow") == 2


def test_the_reason_stays_where_an_empty_content_does_not_help() -> None:
    with pytest.raises(RequestError, match="no calls, please"):
        render("{{ raise_exception('no calls, please') }}", CALLS)


@pytest.mark.parametrize("arguments", ["{", "[1]", "3"])
def test_arguments_that_are_no_object_are_refused(arguments: str) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "grow", "arguments": arguments}}
    with pytest.raises(RequestError, match="arguments of the tool call 'c1' of 'grow' must be"):
        render("{{ messages }}", [{"role": "assistant", "tool_calls": [call]}])


PARTS = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
LOOP = "{% for p in CONTENT %}{{ p.text }}|{% endfor %}"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ messages[0].content }}", "a\nb"),
        ("{{ messages[0]['content'] | trim }}", "a\nb"),
        ("{% for m in messages %}" + LOOP.replace("CONTENT", "m['content']") + "{% endfor %}", "a|b|"),
        ("{% set c = messages[0].content %}" + LOOP.replace("CONTENT", "c"), "a|b|"),
        ("{% set c = messages[0].get('content') or [] %}" + LOOP.replace("CONTENT", "c"), "a|b|"),
        ("{% macro show(x) %}" + LOOP.replace("CONTENT", "x") + "{% endmacro %}{{ show(messages[0].content) }}",
         "a|b|"),
        ("{{ messages[0].content | map(attribute='text') | join('+') }}", "a+b"),
        ("{% for p in messages[0].content.split('\n') %}{{ p }}|{% endfor %}", "a|b|"),
        (LOOP.replace("CONTENT", "messages[1].content") + "{{ messages[0].content }}", "a\nb"),  # one is printed whole
        ("{% if messages[0].content is string %}{{ messages[0].content }}{% endif %}"
         + LOOP.replace("CONTENT", "messages[1].content"), "a\nb"),
    ],
)  # fmt: skip
def test_parts_stay_parts_where_a_template_goes_through_them(source: str, expected: str) -> None:
    assert render(source, [*PARTS, {"role": "assistant", "content": ""}]) == expected


def test_tools_choose_the_template_that_is_made_for_them() -> None:
    template = ChatTemplate("plain", {}, "model/tokenizer_config.json", tool_use="tools {{ tools | length }}")
    assert template.render(USER) == "plain"
    assert template.render(USER, tools=[{}, {}]) == "tools 2"
    assert ChatTemplate("{{ tools | length }}", {}, "m").render(USER, tools=[{}]) == "1"


@pytest.mark.parametrize(
    ("show", "text", "expected"),
    [("m.content", "ab ", "<ab "), ("m.content | trim", "ab ", "<ab"), ("m.content | trim", "ab", "<ab")],
)
def test_the_final_message_is_continued(show: str, text: str, expected: str) -> None:
    source = "{% for m in messages %}<{{ " + show + " }}>{% endfor %}{% if add_generation_prompt %}go{% endif %}"
    assert render(source, [{"role": "assistant", "content": text}], continue_final_message=True) == expected


def test_a_final_message_that_is_not_shown_cannot_be_continued() -> None:
    with pytest.raises(RequestError, match="can't be continued"):
        render("x", [{"role": "assistant", "content": "a"}], continue_final_message=True)
    with pytest.raises(RequestError, match="can't be continued"):  # a part of it is left out
        render("{{ messages[0].content.split('|')[1] }}", [{"role": "assistant", "content": "a|b"}],
               continue_final_message=True)  # fmt: skip


def test_the_last_text_among_the_parts_is_continued() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": " b"}, {"type": "image"}]
    source = "{% for p in messages[0].content %}{{ p.text if p.text else p.type }}|{% endfor %}"
    assert render(source, [{"role": "user", "content": parts}], continue_final_message=True) == "a| b"


def test_a_template_may_look_for_the_mark_of_transformers() -> None:
    """Published templates move it behind the tool calls."""
    source = (
        "{% set mark = 'CONTINUE_FINAL_MESSAGE_TAG ' %}{% set text = messages[0].content %}"
        "{% if text.endswith(mark) %}{{ text[:-(mark|length)] }}[calls]{{ mark }}{% else %}{{ text }}{% endif %}"
    )
    assert render(source, [{"role": "assistant", "content": "a "}], continue_final_message=True) == "a [calls]"


def test_parts_are_kept_where_a_joined_text_is_refused() -> None:
    source = (
        "{% if messages[0].content is string %}{{ raise_exception('parts!') }}{% endif %}"
        "{% for part in messages[0].content %}{{ part.text | upper }}|{% endfor %}"
    )
    assert render(source, PARTS) == "A|B|"


def test_a_namespace_keeps_away_from_what_is_pythons() -> None:
    with pytest.raises(RequestError, match="unsafe"):
        render("{% set n = namespace() %}{% set n.__init__ = 1 %}")
