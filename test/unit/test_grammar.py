"""Constrained output: what may come next, when it is complete, and constraints that can't be used."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ramet.srt.errors import RequestError
from ramet.srt.sampling.grammar import Grammar, GrammarBackend, check_grammar
from ramet.srt.sampling.sampling_params import parse_sampling_params
from ramet.srt.text.tokenizer import Tokenizer
from random_models import EOS, IM_END, write_tokenizer

VOCAB_SIZE = 331


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(Path(folder))
    return Tokenizer.from_path(str(folder))


@pytest.fixture(scope="module")
def backend(tokenizer: Tokenizer) -> GrammarBackend:
    return GrammarBackend(lambda: tokenizer, VOCAB_SIZE, [EOS, IM_END])


def compiled(backend: GrammarBackend, **constraint: Any) -> Grammar:
    grammar = backend.compile(parse_sampling_params(constraint, VOCAB_SIZE))
    assert grammar is not None
    return grammar


def allowed(grammar: Grammar) -> set[int]:
    row = np.zeros((VOCAB_SIZE + 31) // 32, np.int32)
    grammar.fill_mask(row)
    return set(np.nonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))[0].tolist())


def random_walk(grammar: Grammar, tokenizer: Tokenizer, seed: int) -> str | None:
    """Text of a random output that keeps to the grammar; None if it didn't end."""
    choose, ids = random.Random(seed), []
    for _ in range(400):
        token_id = choose.choice(sorted(allowed(grammar)))
        assert token_id < VOCAB_SIZE
        assert grammar.accept(token_id)
        ids.append(token_id)
        if grammar.is_terminated:
            return tokenizer.decode(ids, skip_special_tokens=True)
    return None


@pytest.mark.parametrize("seed", range(3))
def test_random_output_keeps_to_the_schema(backend: GrammarBackend, tokenizer: Tokenizer, seed: int) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["x", "y"]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    text = random_walk(compiled(backend, json_schema=schema), tokenizer, seed)
    assert text is not None, "white space is bounded, so even a random output ends"
    value = json.loads(text)
    assert 0 <= value["a"] <= 99
    assert value["b"] in ("x", "y")


@pytest.mark.parametrize("ebnf", ['root ::= "x" [0-9] "y"', 'start: "x" /[0-9]/ "y"'])
def test_both_grammar_languages(backend: GrammarBackend, tokenizer: Tokenizer, ebnf: str) -> None:
    text = random_walk(compiled(backend, ebnf=ebnf), tokenizer, 0)
    assert text is not None
    assert len(text) == 3
    assert text[0] == "x"
    assert text[2] == "y"


def test_end_is_allowed_exactly_when_complete(backend: GrammarBackend, tokenizer: Tokenizer) -> None:
    grammar = compiled(backend, regex="ab*")
    (a,), (b,) = tokenizer.encode("a", False), tokenizer.encode("b", False)
    assert not {EOS, IM_END} & allowed(grammar)
    assert not grammar.accept(EOS)
    assert grammar.accept(a)
    assert not grammar.is_terminated
    assert {EOS, IM_END, b} <= allowed(grammar)
    assert not grammar.accept(a), "refused, and nothing has changed"
    assert grammar.accept(b)
    assert grammar.accept(EOS)
    assert grammar.is_terminated
    assert allowed(grammar) == {EOS, IM_END}


def test_complete_output_terminates_without_an_end_token(backend: GrammarBackend, tokenizer: Tokenizer) -> None:
    grammar = compiled(backend, regex="a")
    assert grammar.accept(tokenizer.encode("a", False)[0])
    assert grammar.is_terminated
    assert allowed(grammar) == {EOS, IM_END}


def test_copies_are_independent(backend: GrammarBackend, tokenizer: Tokenizer) -> None:
    grammar = compiled(backend, regex="a[bc]")
    grammar.accept(tokenizer.encode("a", False)[0])
    twin = grammar.copy()
    assert twin.accept(tokenizer.encode("b", False)[0])
    assert twin.is_terminated
    assert not grammar.is_terminated
    fresh = compiled(backend, regex="a[bc]")
    assert not {EOS, IM_END} & allowed(fresh) and fresh.accept(tokenizer.encode("a", False)[0]), (
        "the cached one is untouched"
    )


def test_free_output_has_no_grammar(backend: GrammarBackend) -> None:
    assert backend.compile(parse_sampling_params({}, VOCAB_SIZE)) is None


@pytest.mark.parametrize(
    "constraint",
    [
        {"regex": "("},
        {"json_schema": "{"},
        {"json_schema": {"type": "nothing"}},
        {"json_schema": "[1]"},
        {"ebnf": "root ::= missing"},
        {"ebnf": "garbage"},
    ],
)
def test_unusable_constraints_are_named(backend: GrammarBackend, constraint: dict[str, Any]) -> None:
    params = parse_sampling_params(constraint, VOCAB_SIZE)
    for attempt in (check_grammar, backend.compile):
        with pytest.raises(RequestError) as caught:
            attempt(params)
        assert caught.value.param == next(iter(constraint))
        assert "\n" not in str(caught.value)


def test_model_without_an_end_token() -> None:
    with pytest.raises(ValueError, match="end-of-sequence"):
        GrammarBackend(None, VOCAB_SIZE, [])  # type: ignore[arg-type]


def test_a_tokenizer_with_more_tokens_than_the_model(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    more = [f"<extra{number}>" for number in range(VOCAB_SIZE)]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"additional_special_tokens": more}))
    tokenizer = Tokenizer.from_path(str(tmp_path))
    assert tokenizer.vocab_size > VOCAB_SIZE
    grammar = GrammarBackend(lambda: tokenizer, VOCAB_SIZE, [2]).compile(
        parse_sampling_params({"regex": "ab"}, VOCAB_SIZE)
    )
    assert grammar is not None
    assert grammar.accept(tokenizer.encode("a")[-1])
