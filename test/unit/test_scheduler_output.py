"""What ends a request, and whether its last token is content: a stop token's text is not, a grammar's last token is."""

from pathlib import Path
from typing import Any

import pytest
from ramet.srt.managers.io_struct import TokenizedGenerateReqInput
from ramet.srt.managers.schedule_batch import Req
from ramet.srt.managers.scheduler_output import PROGRESS_S, OutputProcessor, make_output
from ramet.srt.sampling.sampling_params import parse_sampling_params
from ramet.srt.text.tokenizer import Tokenizer
from random_models import write_tokenizer

EOS = 4


class Grammar:
    """One that is complete after `length` tokens, as its process says between two of them."""

    failure = None

    def __init__(self, length: int):
        self.left = length

    @property
    def is_terminated(self) -> bool:
        self.left -= 1
        return self.left <= 0


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(Path(folder))
    return Tokenizer.from_path(str(folder))


def run(tokenizer: Tokenizer, ids: list[int], grammar: Any = None, **params: Any) -> Req:
    message = TokenizedGenerateReqInput(
        rid="r", input_ids=[69], sampling_params=parse_sampling_params(params, 331), stream=False, return_logprob=False,
        logprob_start_len=-1, top_logprobs_num=0,
    )  # fmt: skip
    req = Req(message, 0, grammar=grammar)
    processor = OutputProcessor(lambda: tokenizer, [EOS], 1)
    for token_id in ids:
        processor.append_token(req, token_id)
        if req.finish_reason is not None:
            break
    return req


@pytest.mark.parametrize(
    ("params", "num_tokens", "matched", "is_cut"),
    [
        ({}, 3, EOS, True),
        ({"stop_token_ids": [70]}, 2, 70, True),
        ({"ignore_eos": True, "stop": "<|im_end|>"}, 3, "<|im_end|>", False),
        ({"ignore_eos": True, "stop": "b<|im_end|>"}, 3, "b<|im_end|>", False),
        ({"ignore_eos": True, "stop": "<|im_end|>a"}, 4, "<|im_end|>a", False),
        ({"stop": "b"}, 2, "b", False),
        ({"max_new_tokens": 1}, 1, None, False),
        ({"grammar": Grammar(2)}, 2, 70, False),
        ({"grammar": Grammar(9)}, 3, EOS, True),
    ],
)
def test_the_last_token(
    tokenizer: Tokenizer, params: dict[str, Any], num_tokens: int, matched: Any, is_cut: bool
) -> None:
    req = run(tokenizer, [69, 70, EOS, 69, 70], **params)
    assert len(req.output_ids) == num_tokens
    assert req.finish_reason is not None
    assert req.finish_reason.matched == matched
    assert make_output(req).ends_in_stop_token is is_cut


def test_what_is_not_streamed_tells_of_its_progress_now_and_then(tokenizer: Tokenizer) -> None:
    """So that tokens are counted while they come, at the cost of an output a second."""
    req, processor = run(tokenizer, []), OutputProcessor(lambda: tokenizer, [EOS], 1)
    now, outputs = 100.0, []
    for _ in range(21):
        req.output_ids.append(69)
        req.note_token_time(now)
        outputs.append(processor.collect(req))
        now += PROGRESS_S / 8
    sent = {number: output for number, output in enumerate(outputs) if output is not None}
    assert {number: len(output.token_ids) for number, output in sent.items()} == {8: 9, 16: 8}
    assert sent[8].gaps_s == sent[16].gaps_s == [PROGRESS_S / 8] * 8
    assert len(make_output(req).gaps_s) == 4


def test_a_stream_has_the_time_before_each_token(tokenizer: Tokenizer) -> None:
    req, processor = run(tokenizer, []), OutputProcessor(lambda: tokenizer, [EOS], 2)
    req.stream = True
    sent = []
    for now in (5.0, 5.5, 7.0, 7.25):
        req.output_ids.append(69)
        req.note_token_time(now)
        if (output := processor.collect(req)) is not None:
            sent.append(output.gaps_s)
    assert sent == [[], [0.5, 1.5]]
