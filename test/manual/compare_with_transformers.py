"""Chat templates and tokenizers of real models against transformers: `compare_with_transformers.py FOLDER …`.

Each FOLDER may hold chat templates (*.jinja) and model folders with a tokenizer.json. Nothing that differs is silent:
each difference is printed, then the numbers. Templates are rendered for chats of many kinds; tokenizers are compared by
their added tokens, by the ids of texts, by decoding random ids, and piece by piece in a stream.
"""

import argparse
import contextlib
import copy
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ramet.srt.text.chat_template import ChatTemplate
from ramet.srt.text.incremental_decode import IncrementalDecoder
from ramet.srt.text.tokenizer import Tokenizer

SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
TOOL = {
    "type": "function",
    "function": {
        "name": "grow",
        "description": "Let a plant grow.",
        "parameters": {"type": "object", "properties": {"cm": {"type": "integer"}}, "required": ["cm"]},
    },
}
CALL = {"id": "call00001", "type": "function", "function": {"name": "grow", "arguments": {"cm": 3, "why": "a < b & ä"}}}
USER = {"role": "user", "content": "What is a ramet?"}
ANSWER = {"role": "assistant", "content": "One plant of a clone."}
SYSTEM = {"role": "system", "content": "Be brief."}
PARTS = {"role": "user", "content": [{"type": "text", "text": "What is"}, {"type": "text", "text": "a ramet?"}]}
CALLING = [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]},
           {"role": "tool", "content": '{"cm": 3}', "tool_call_id": "call00001", "name": "grow"}]  # fmt: skip
OTHER_TOOL = {
    "type": "function",
    "function": {
        "name": "list_plants",
        "description": 'The plants of a garden.\nOne a line: <name> & "age", ä 植.',
        "parameters": {
            "type": "object",
            "properties": {
                "garden": {"type": "string", "enum": ["north", "south"], "default": "north"},
                "ages": {"type": "array", "items": {"type": "number"}},
                "kind": {"anyOf": [{"type": "string"}, {"type": "null"}], "description": "One kind, or all."},
                "within": {"type": "object", "properties": {"m": {"type": "number"}}, "required": ["m"]},
            },
            "required": [],
        },
    },
}
OTHER_CALL = {
    "id": "call00002",
    "type": "function",
    "function": {"name": "list_plants", "arguments": {"garden": "south", "ages": [1, 2.5], "kind": None, "within": {}}},
}
RESULT = {"role": "tool", "content": '{"cm": 3}', "tool_call_id": "call00001", "name": "grow"}
OTHER_RESULT = {"role": "tool", "content": "fern\nmoss", "tool_call_id": "call00002", "name": "list_plants"}
TWO_CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL, OTHER_CALL]}
CHATS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "user": ([USER], {}),
    "no prompt": ([USER], {"add_generation_prompt": False}),
    "system": ([SYSTEM, USER], {}),
    "turns": ([USER, ANSWER, USER], {}),
    "system and turns": ([SYSTEM, USER, ANSWER, USER, ANSWER], {"add_generation_prompt": False}),
    "None": ([USER, {**ANSWER, "tool_calls": None, "refusal": None, "name": None}, {**USER, "name": None}], {}),
    "None as content": ([USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}], {}),
    "parts": ([PARTS], {}),
    "parts in turns": ([USER, ANSWER, PARTS], {}),
    "calls": (CALLING, {}),
    "calls and tools": (CALLING, {"tools": [TOOL]}),
    "tools": ([SYSTEM, USER], {"tools": [TOOL]}),
    "reasoning": ([USER, {**ANSWER, "reasoning_content": "Hm."}, USER], {}),
    "thinking off": ([USER], {"enable_thinking": False}),
    "thinking on": ([USER], {"enable_thinking": True, "thinking": True}),
    "thinking off by its other name": ([SYSTEM, USER], {"thinking": False}),
    "little effort": ([USER], {"reasoning_effort": "low"}),
    "tools, thinking off": ([SYSTEM, USER], {"tools": [TOOL, OTHER_TOOL], "enable_thinking": False}),
    "two tools": ([USER], {"tools": [TOOL, OTHER_TOOL]}),
    "two calls": ([USER, TWO_CALLS, RESULT, OTHER_RESULT], {"tools": [TOOL, OTHER_TOOL]}),
    "call after call": (
        [SYSTEM, *CALLING, {"role": "assistant", "content": "", "tool_calls": [OTHER_CALL]}, OTHER_RESULT],
        {"tools": [TOOL, OTHER_TOOL]},
    ),
    "answered calls": ([*CALLING, ANSWER, USER], {"tools": [TOOL]}),
    "text and call": (
        [USER, {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL]}, RESULT],
        {"tools": [TOOL]},
    ),
    "reasoning and call": (
        [USER, {"role": "assistant", "content": "", "reasoning_content": "Hm.", "tool_calls": [CALL]}, RESULT],
        {"tools": [TOOL], "enable_thinking": True},
    ),
    "reasoning in the text": ([USER, {**ANSWER, "content": "<think>\nHm.\n</think>\n\nA plant."}, USER], {}),
    "parts of all": (
        [
            {"role": "system", "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief."}]},
            PARTS,
            {"role": "assistant", "content": [{"type": "text", "text": "A plant."}]},
            PARTS,
        ],
        {},
    ),
    "parts of a result": (
        [*CALLING[:2], {**RESULT, "content": [{"type": "text", "text": "3"}, {"type": "text", "text": "cm"}]}],
        {"tools": [TOOL]},
    ),
    "odd texts": ([{"role": "user", "content": "  {{ 1 }} <|im_end|> {% if %} \\n é 植物 🌱 \n"}, ANSWER, USER], {}),
    "empty texts": ([{"role": "system", "content": ""}, {"role": "user", "content": ""}], {}),
    "continued": ([USER, ANSWER], {"continue_final_message": True, "add_generation_prompt": False}),
}
KEPT = object()  # the content as it is
TEXTS = ("a ramet", "植物 🌱 é", "  two  spaces\n\n\tand a tab ", "don't , do n't .", "<s>a</s><|im_end|> b", "")


class Counts:
    """What was compared and what differed."""

    def __init__(self) -> None:
        self.same = self.refused = self.different = 0

    def compare(self, where: str, ours: Any, theirs: Any) -> None:
        if ours == theirs:
            self.same += 1
            return
        self.different += 1
        print(f"DIFFERENT {where}\n  ours   {ours!r:.600}\n  theirs {theirs!r:.600}")


def with_text_arguments(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As OpenAI's clients send them: the arguments of calls as JSON."""
    import json

    messages = copy.deepcopy(messages)
    for message in messages:
        for call in message.get("tool_calls") or []:
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return messages


def with_joined_parts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {**message, "content": "\n".join(part["text"] for part in message["content"])}
        if isinstance(message["content"], list)
        else message
        for message in messages
    ]


def other_forms(messages: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """A chat with calls as other templates want it: no content beside them or an empty one, arguments as text."""
    for arguments_as_text in (False, True):
        for content in (KEPT, None, ""):
            chat = with_text_arguments(messages) if arguments_as_text else copy.deepcopy(messages)
            for message in chat:
                if message.get("tool_calls") and content is not KEPT:
                    message["content"] = content
            yield chat


def plain_text(source: str, chat: list[dict[str, Any]], options: dict[str, Any]) -> str | None:
    """The template in transformers' environment, but given the chat as it is: transformers itself leaves out None."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    values = {"tools": None, "documents": None, **SPECIAL_TOKENS, **options}
    with contextlib.suppress(Exception):
        return _compile_jinja_template(source).render(messages=copy.deepcopy(chat), **values)
    return None


def compare_template(file: Path, their_tokenizer: Any, counts: Counts) -> None:
    source = file.read_text()
    ours = ChatTemplate(source, SPECIAL_TOKENS, str(file))
    for name, (messages, options) in CHATS.items():
        options = {"add_generation_prompt": True, **options}

        def their_text(chat: list[dict[str, Any]], options: dict[str, Any] = options) -> str | None:
            with contextlib.suppress(Exception):
                return their_tokenizer.apply_chat_template(
                    copy.deepcopy(chat), chat_template=source, tokenize=False, **options
                )
            return None

        expected = {their_text(messages)}
        if name.startswith("parts"):  # where a template takes texts alone, ours are the parts joined
            joined = their_text(with_joined_parts(messages))
            expected = {joined} if None in expected or "'text'" in str(expected) else expected | {joined}
        names = {call["function"]["name"] for message in messages for call in message.get("tool_calls") or []}
        if names and not any(text and all(name in text for name in names) for text in expected):
            # The template refuses this form of a call or leaves the call out: another form may show it.
            for form in (*other_forms(messages), *other_forms(with_joined_parts(messages))):
                expected |= {their_text(form), plain_text(source, form, options)}
        try:
            text: str | None = ours.render(with_text_arguments(messages), **options)
        except ValueError:
            text = None
        if text is None and None in expected:
            counts.refused += 1
        else:
            counts.compare(f"{file.name}: {name}", text, text if text in expected else sorted(map(str, expected)))


def compare_tokenizer(folder: Path, counts: Counts, seed: int, num_sequences: int) -> None:
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    ours = Tokenizer.from_path(str(folder))
    added = [{str(i): repr(token) for i, token in one.get_added_tokens_decoder().items()}
             for one in (ours._backend, theirs.backend_tokenizer)]  # fmt: skip
    counts.compare(f"{folder}: added tokens", added[0], added[1])
    for text in TEXTS:
        counts.compare(
            f"{folder}: ids of {text!r}", ours.encode(text, False), theirs.encode(text, add_special_tokens=False)
        )
    chance = random.Random(seed)
    special = sorted(theirs.backend_tokenizer.get_added_tokens_decoder())
    for number in range(num_sequences):
        ids = [chance.choice(special) if special and chance.random() < 0.2 else chance.randrange(ours.vocab_size)
               for _ in range(chance.randint(1, 40))]  # fmt: skip
        for skip in (True, False):
            where = f"{folder}: sequence {number}, skip_special_tokens={skip}, {ids}"
            counts.compare(where, ours.decode(ids, skip), theirs.decode(ids, skip_special_tokens=skip))
            cut = chance.randrange(len(ids))
            decoder = IncrementalDecoder(ours, ids[:cut], skip)
            pieces = [decoder.push([token_id]) for token_id in ids[cut:]] + [decoder.push([], final=True)]
            before = len(theirs.decode(ids[:cut], skip_special_tokens=skip))
            counts.compare(f"{where}, streamed from {cut}", "".join(pieces),
                           theirs.decode(ids, skip_special_tokens=skip)[before:])  # fmt: skip


def their_plain_tokenizer() -> Any:
    """A tokenizer of transformers that has special tokens and nothing else."""
    from tokenizers import Tokenizer as BackendTokenizer
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=BackendTokenizer(BPE()), **SPECIAL_TOKENS)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sequences", type=int, default=300, help="random sequences for each tokenizer")
    args = parser.parse_args()
    plain = their_plain_tokenizer()
    templates, tokenizers = Counts(), Counts()
    num_templates = num_tokenizers = 0
    for folder in args.folders:
        for file in sorted(folder.rglob("*.jinja")):
            compare_template(file, plain, templates)
            num_templates += 1
        for file in sorted(folder.rglob("tokenizer.json")):
            compare_tokenizer(file.parent, tokenizers, args.seed, args.sequences)
            num_tokenizers += 1
    for what, number, counts in (("templates", num_templates, templates), ("tokenizers", num_tokenizers, tokenizers)):
        print(
            f"{number} {what}: {counts.same} the same, {counts.refused} refused by both, {counts.different} different"
        )
    return 1 if templates.different or tokenizers.different else 0


if __name__ == "__main__":
    sys.exit(main())
