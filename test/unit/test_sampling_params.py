"""Sampling parameters: what is accepted, what is refused, and that a refusal names the parameter."""

from typing import Any

import pytest
from ramet.srt.errors import RequestError
from ramet.srt.sampling.sampling_params import (
    SamplingParams,
    parse_sampling_params,
    sampling_params_schema,
    with_whole_numbers,
)

VOCAB_SIZE = 100


def test_defaults() -> None:
    assert parse_sampling_params({}, VOCAB_SIZE) == SamplingParams()


@pytest.mark.parametrize(
    ("given", "name", "expected"),
    [
        ({"stop": "a"}, "stop", ["a"]),
        ({"stop": None}, "stop", []),
        ({"json_schema": {"type": "object"}}, "json_schema", '{"type": "object"}'),
        ({"logit_bias": {"7": 1}}, "logit_bias", {7: 1.0}),
        ({"logit_bias": {7: -1.5}}, "logit_bias", {7: -1.5}),
        ({"temperature": 1e-9}, "temperature", 0.0),
        ({"temperature": 1}, "temperature", 1.0),
        ({"top_k": 0}, "top_k", -1),
        ({"max_new_tokens": 3.0}, "max_new_tokens", 3),
        ({"sampling_seed": -5}, "sampling_seed", -5),
    ],
)
def test_accepted_and_resolved(given: dict[str, Any], name: str, expected: Any) -> None:
    assert getattr(parse_sampling_params(given, VOCAB_SIZE), name) == expected


@pytest.mark.parametrize(
    ("given", "param", "words"),
    [
        ({"tempratur": 1}, "tempratur", "the known ones are max_new_tokens"),
        ({"temperature": -1}, "temperature", "temperature"),
        ({"temperature": float("nan")}, "temperature", "finite"),
        ({"temperature": float("inf")}, "temperature", "finite"),
        ({"temperature": "1"}, "temperature", "must be a number, not a string"),
        ({"top_p": 0}, "top_p", "must be above 0.0"),
        ({"top_p": 1.1}, "top_p", "must be at most 1.0"),
        ({"top_k": -2}, "top_k", "must be at least -1"),
        ({"top_k": 1.5}, "top_k", "must be an integer, not a number"),
        ({"min_p": 2}, "min_p", "must be at most 1.0"),
        ({"repetition_penalty": 0}, "repetition_penalty", "must be at least 0.01"),
        ({"presence_penalty": 3}, "presence_penalty", "must be at most 2.0"),
        ({"frequency_penalty": -3}, "frequency_penalty", "must be at least -2.0"),
        ({"max_new_tokens": -1}, "max_new_tokens", "must be at least 0"),
        ({"max_new_tokens": True}, "max_new_tokens", "must be an integer, not true or false"),
        ({"max_new_tokens": 10**30}, "max_new_tokens", "must be at most"),
        ({"min_new_tokens": 5, "max_new_tokens": 4}, "min_new_tokens", "max_new_tokens"),
        ({"stop": 5}, "stop", "must be a string or a list, not an integer"),
        ({"json_schema": 5}, "json_schema", "must be an object or a string, not an integer"),
        ({"allowed_token_ids": [100]}, "allowed_token_ids", "[0, 100)"),
        ({"bad_words": [""]}, "bad_words", "bad_words[0] must not be empty"),
        ({"sampling_seed": 2**63}, "sampling_seed", f"must be at most {2**63 - 1}"),
        ({"stop": ""}, "stop", "stop[0] must not be empty"),
        ({"stop": ["a", 1]}, "stop", "stop[1] must be a string, not an integer"),
        ({"stop": ["\ud800"]}, "stop", "surrogate"),
        ({"stop": "\ud800"}, "stop", "surrogate"),
        ({"stop": {"\ud800": 1}}, "stop", ""),
        ({"logit_bias": {"\ud800": 1}}, "logit_bias", "surrogate"),
        ({"temperature": "\ud800"}, "temperature", "surrogate"),
        ({"json_schema": ["\ud800"]}, "json_schema", ""),
        ({"regex": "a\udc00"}, "regex", "surrogate"),
        ({"\ud800": 1}, "\ud800", "unknown"),
        ({"logit_bias": dict.fromkeys(range(5000), 1)}, "logit_bias", "must have a length of at most 4096"),
        ({"stop_token_ids": [100]}, "stop_token_ids", "[0, 100)"),
        ({"logit_bias": {"1": 1, "abc": 1}}, "logit_bias", "the key 'abc' is not a token id"),
        ({"logit_bias": {"1.5": 1}}, "logit_bias", "the key '1.5' is not a token id"),
        ({"logit_bias": {"100": 1}}, "logit_bias", "token id 100 is not in [0, 100)"),
        ({"logit_bias": {"-1": 1}}, "logit_bias", "token id -1 is not in [0, 100)"),
        ({"logit_bias": {"7": 1, "1": 101}}, "logit_bias", "['1'] must be at most 100.0"),
        ({"logit_bias": {"1": "x"}}, "logit_bias", "['1'] must be a number, not a string"),
        ({"logit_bias": {"1": float("nan")}}, "logit_bias", "['1']"),
        ({"logit_bias": [1]}, "logit_bias", "must be an object, not a list"),
        ({"n": 0}, "n", "must be at least 1"),
        ({"ignore_eos": 1}, "ignore_eos", "must be true or false, not an integer"),
        ({"regex": "a", "ebnf": "b"}, "ebnf", "only one of"),
        ([], "sampling_params", "object"),
    ],
)
def test_refused_by_name(given: Any, param: str, words: str) -> None:
    with pytest.raises(RequestError, match=None) as caught:
        parse_sampling_params(given, VOCAB_SIZE)
    assert caught.value.param == param
    assert words in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_schema_knows_every_parameter() -> None:
    schema = sampling_params_schema()
    assert set(schema["properties"]) == set(SamplingParams.__struct_fields__)
    assert schema["additionalProperties"] is False


def test_a_lone_surrogate_is_named_where_it_stands() -> None:
    for values, name in (({"stop": "\ud800"}, "stop"), ({"regex": "\ud800"}, "regex"), ({"ebnf": "a\udc00"}, "ebnf")):
        with pytest.raises(RequestError, match=f"^{name} holds a lone surrogate") as caught:
            parse_sampling_params(values, 331)
        assert caught.value.param == name


def test_a_schema_that_is_too_deep_to_be_written_is_the_clients_mistake() -> None:
    schema: dict[str, Any] = {}
    for _ in range(100_000):
        schema = {"items": schema}
    with pytest.raises(RequestError) as caught:
        parse_sampling_params({"json_schema": schema}, 331)
    assert caught.value.param == "json_schema"


def nested(depth: int, leaf: Any) -> Any:
    for _ in range(depth):
        leaf = [{"a": leaf}]
    return leaf


@pytest.mark.parametrize("name", ["stop", "top_k", "sampling_seed", "logit_bias"])
def test_what_is_nested_deeper_than_python_recurses_is_the_clients_mistake(name: str) -> None:
    with pytest.raises(RequestError) as refused:
        parse_sampling_params({name: nested(2000, 1.0)}, VOCAB_SIZE)
    assert refused.value.param == name


def test_whole_numbers_are_found_at_every_depth_and_the_given_value_stays() -> None:
    given = {"a": [1.0, {"b": 2.0, "c": 2.5}], "d": nested(2000, 3.0)}
    changed = with_whole_numbers(given)
    assert changed["a"] == [1, {"b": 2, "c": 2.5}]
    assert [type(changed["a"][0]), type(given["a"][0])] == [int, float]
    inner = changed["d"]
    for _ in range(2000):
        inner = inner[0]["a"]
    assert type(inner) is int
