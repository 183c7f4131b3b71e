"""From what a client asks for to what the scheduler gets: tokens, limits, defaults, and copies."""

from pathlib import Path
from typing import Any

import pytest
from ramet.srt.errors import RequestError
from ramet.srt.managers.prepare_requests import Limits, SequenceInput, is_slow, prepare_requests
from ramet.srt.sampling.sampling_params import parse_sampling_params
from ramet.srt.text.tokenizer import Tokenizer
from random_models import write_tokenizer

LIMITS = Limits(vocab_size=331, max_req_len=100, has_eos=True, grammars=True)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(Path(folder))
    return Tokenizer.from_path(str(folder))


def sequence(params: dict[str, Any] | None = None, **fields: Any) -> SequenceInput:
    return SequenceInput(sampling_params=parse_sampling_params(params or {}, 331), **fields)


def test_ids_of_the_sequences(tokenizer: Tokenizer) -> None:
    (one,) = prepare_requests([sequence({"max_new_tokens": 5}, text="a")], "r", tokenizer, LIMITS)
    assert (one.rid, one.input_ids) == ("r", tokenizer.encode("a"))
    inputs = [
        sequence({"n": 2, "sampling_seed": 7, "max_new_tokens": 5}, input_ids=[5]),
        sequence({"max_new_tokens": 5}, input_ids=[6]),
    ]
    requests = prepare_requests(inputs, "r", tokenizer, LIMITS)
    assert [one.rid for one in requests] == ["r_0", "r_1", "r_2"]
    assert [one.input_ids for one in requests] == [[5], [5], [6]]
    assert [one.sampling_params.sampling_seed for one in requests] == [7, 8, None]
    assert [one.sampling_params.n for one in requests] == [1, 1, 1]


def test_a_default_length_is_fitted_and_a_wanted_one_is_not(tokenizer: Tokenizer) -> None:
    prompt = sequence(input_ids=[5] * 90, fit_max_new_tokens=True)
    (one,) = prepare_requests([prompt], "r", tokenizer, LIMITS)
    assert one.sampling_params.max_new_tokens == 10
    assert prompt.sampling_params.max_new_tokens == 128, "what was given is untouched"
    with pytest.raises(RequestError, match="max_new_tokens is 11") as caught:
        prepare_requests([sequence({"max_new_tokens": 11}, input_ids=[5] * 90)], "r", tokenizer, LIMITS)
    assert caught.value.code == "context_length_exceeded"
    (one,) = prepare_requests([sequence({"max_new_tokens": 1}, input_ids=[5] * 99)], "r", tokenizer, LIMITS)
    assert one.sampling_params.max_new_tokens == 1


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"input_ids": []}, "text", "empty"),
        ({"input_ids": [5] * 100}, "text", "100 tokens"),
        ({"input_ids": [331]}, "text", "[0, 331)"),
        ({"text": "植" * 10**6}, "text", "more than"),
        ({"text": "\ud800"}, "text", "surrogate"),
        ({"input_ids": [5], "top_logprobs_num": 129}, "top_logprobs_num", "128"),
        ({"input_ids": [5], "return_logprob": True, "logprob_start_len": 2}, "logprob_start_len", "beyond"),
        ({"input_ids": [5], "params": {"regex": "a" * (64 * 1024 + 1)}}, "regex", "65536"),
        ({"input_ids": [5], "params": {"ebnf": "植" * 200_000}}, "ebnf", "600000 bytes"),
        ({"input_ids": [5], "params": {"min_new_tokens": 100, "max_new_tokens": 100}}, "min_new_tokens", "context"),
        ({"input_ids": [5] * 50, "params": {"min_new_tokens": 51}, "fit_max_new_tokens": True}, "min_new_tokens", ""),
    ],
)
def test_refusals(tokenizer: Tokenizer, fields: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(RequestError) as caught:
        prepare_requests([sequence(**fields)], "r", tokenizer, LIMITS)
    assert caught.value.param == param
    assert words in str(caught.value)


def test_lists_of_tokens_are_bounded_for_all_sequences_together(tokenizer: Tokenizer) -> None:
    one = sequence({"allowed_token_ids": [5] * 65_536, "max_new_tokens": 1, "n": 16}, input_ids=[5])
    assert len(prepare_requests([one], "r", tokenizer, LIMITS)) == 16
    with pytest.raises(RequestError, match="allowed_token_ids: the sequences of a request may have at most 1048576"):
        prepare_requests([one, one], "r", tokenizer, LIMITS)


def test_bad_words_of_many_prompts_are_read_once(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = []
    encode = Tokenizer.encode
    monkeypatch.setattr(
        Tokenizer, "encode", lambda self, text, *args, **kw: texts.append(text) or encode(self, text, *args, **kw)
    )
    one = sequence({"bad_words": ["a", "b"], "max_new_tokens": 1}, input_ids=[5])
    other = sequence({"max_new_tokens": 1}, input_ids=[5])
    requests = prepare_requests([one, one, other, one], "r", tokenizer, LIMITS)
    assert [bool(request.bad_words_ids) for request in requests] == [True, True, False, True]
    assert requests[0].bad_words_ids == requests[3].bad_words_ids and len(texts) == 8
    assert is_slow([one]) and not is_slow([other])


def test_grammars_need_a_backend_and_an_end(tokenizer: Tokenizer) -> None:
    prompt = sequence({"regex": "a"}, input_ids=[5], fit_max_new_tokens=True)
    for changes, words in (({"grammars": False}, "--grammar-backend"), ({"has_eos": False}, "end-of-sequence")):
        limits = Limits(**{"vocab_size": 331, "max_req_len": 100, "has_eos": True, "grammars": True} | changes)
        with pytest.raises(RequestError, match=words):
            prepare_requests([prompt], "r", tokenizer, limits)
    assert prepare_requests([prompt], "r", tokenizer, LIMITS)


def test_too_many_sequences(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="4096"):
        prepare_requests([sequence({"n": 128}, input_ids=[5])] * 33, "r", tokenizer, LIMITS)


def test_megabytes_are_refused_without_tokenizing_them(tokenizer: Tokenizer) -> None:
    sizes: list[int] = []

    class Counting:
        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            sizes.append(len(text))
            return tokenizer.encode(text, add_special_tokens)

    with pytest.raises(RequestError, match="more than"):
        prepare_requests([sequence(text="word " * 10**6)], "r", Counting(), LIMITS)  # type: ignore[arg-type]
    assert sizes == [800]


def test_what_is_slow() -> None:
    assert not is_slow([sequence(text="a" * 1000)] * 4)
    assert is_slow([sequence(text="a" * 1000)] * 5)
    assert not is_slow([sequence({"regex": "a"}, text="a")]), "it is compiled elsewhere"
    assert not is_slow([sequence(input_ids=[5] * 10**5)])
    assert is_slow([sequence(input_ids=[5] * 10**5)] * 3)
