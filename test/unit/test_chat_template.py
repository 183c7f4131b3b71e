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
