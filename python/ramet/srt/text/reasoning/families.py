"""Owns the forms of reasoning by name, which one a chat template is made for, and where a prompt stands in it."""

from enum import Enum
from typing import NamedTuple

from ramet.srt.configs.parser_config import HARMONY, NONE
from ramet.srt.text.reasoning.think_parser import ThinkMarks
from ramet.srt.text.tool_calls.kimi_k2 import SECTION_BEGIN as KIMI_CALLS

THINK = ThinkMarks("<think>", "</think>")
KIMI_THINK = ThinkMarks("◁think▷", "◁/think▷")


class PromptState(Enum):
    """Where a prompt ends."""

    OPEN = "in reasoning"
    CLOSED = "behind reasoning"
    FREE = "where the model may begin to reason"


class ReasoningFormat(NamedTuple):
    """How a family of models writes its reasoning."""

    pairs: tuple[ThinkMarks, ...]
    interrupts: tuple[str, ...] = ()  # marks of calls, which end it, too
    always_begins: bool = False  # the model reasons without writing the first mark, unless the prompt forbids it

    @property
    def marks(self) -> tuple[str, ...]:
        """Texts that may be special tokens, and must be in what is parsed."""
        return (*(mark for pair in self.pairs for mark in pair), *self.interrupts)

    def prompt_state(self, prompt: str, continued: str | None) -> tuple[PromptState, ThinkMarks]:
        """Where the prompt ends, and the marks of the reasoning that it is in or comes next.

        Args:
            continued: the text of the final message, where the output is to continue it.
        """
        if continued is not None:
            for pair in self.pairs:
                if continued.rpartition(pair.end)[2].lstrip().startswith(pair.begin):
                    return PromptState.OPEN, pair
            return PromptState.CLOSED, self.pairs[0]
        text = prompt.rstrip()
        for pair in self.pairs:
            if text.endswith(pair.begin):
                return PromptState.OPEN, pair
            if text.endswith(pair.end):
                return PromptState.CLOSED, pair
        return (PromptState.OPEN if self.always_begins else PromptState.FREE), self.pairs[0]


# gpt-oss's is not among them: the parser of its calls reads both.
FORMATS = {
    "deepseek-r1": ReasoningFormat((THINK,), always_begins=True),
    "glm45": ReasoningFormat((THINK,)),
    "kimi": ReasoningFormat((THINK, KIMI_THINK), interrupts=(KIMI_CALLS,)),
    "qwen3": ReasoningFormat((THINK,)),
}


def recognise_reasoning(template: str) -> str:
    """The name of the form of reasoning that a chat template knows; "none" if it is none of these."""
    if "<|channel|>" in template and "analysis" in template:
        return HARMONY
    if KIMI_THINK.begin in template or (KIMI_CALLS in template and THINK.end in template):
        return "kimi"
    if THINK.end not in template and THINK.begin not in template:
        return NONE
    if "<arg_key>" in template:
        return "glm45"
    # Those of the first DeepSeek R1 only take the reasoning out of the history: the model writes no mark by itself.
    return "deepseek-r1" if "<｜Assistant｜>" in template and THINK.begin not in template else "qwen3"
