"""What a completion tells of its tokens' log-probabilities."""

from types import SimpleNamespace
from typing import Any

import pytest
from ramet.srt.entrypoints.openai.protocol import CompletionRequest
from ramet.srt.entrypoints.openai.serving_completions import ChoiceWriter
from ramet.srt.managers.io_struct import TokenLogprobs

TOKENS = {1: b"a", 2: b"b", 3: b"c"}
PROMPT = TokenLogprobs(logprobs=[None, -3.0], token_ids=[1, 2], top_logprobs=[[], [-1.0]], top_token_ids=[[], [3]])
OUTPUT = TokenLogprobs(
    logprobs=[-0.5, -2.0], token_ids=[1, 2], top_logprobs=[[-0.5], [-0.25]], top_token_ids=[[1], [3]]
)


def top_logprobs(logprobs: int) -> list[dict[str, float] | None]:
    tokenizer: Any = SimpleNamespace(token_bytes=TOKENS.__getitem__)
    sequence: Any = SimpleNamespace(
        input_logprobs=PROMPT, output_logprobs=OUTPUT, output_ids=[1, 2], finish_reason=None
    )
    body = CompletionRequest(model="m", prompt="ab", echo=True, logprobs=logprobs)
    choice = ChoiceWriter(body, tokenizer, sequence, "ab").choice(0, "ab", 0, 2)
    found: list[dict[str, float] | None] = choice["logprobs"]["top_logprobs"]
    return found


@pytest.mark.parametrize(
    ("logprobs", "expected"),
    [(1, [None, {"c": -1.0, "b": -3.0}, {"a": -0.5}, {"c": -0.25, "b": -2.0}]), (0, [None] * 4)],
)
def test_the_token_itself_is_among_the_likeliest_or_one_more(logprobs: int, expected: list[Any]) -> None:
    assert top_logprobs(logprobs) == expected
