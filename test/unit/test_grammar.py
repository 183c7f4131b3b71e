"""Constrained output: what may come next, when it is complete, and constraints that can't be used."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ramet.srt.errors import RequestError
from ramet.srt.sampling.constraint import Constraint, constraint_of
from ramet.srt.sampling.grammar import Grammar, GrammarCompiler, GrammarError, call_library
from ramet.srt.sampling.sampling_params import SamplingParams, parse_sampling_params
from ramet.srt.text.tokenizer import Tokenizer
from random_models import EOS, IM_END, write_tokenizer

VOCAB_SIZE = 331


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(Path(folder))
    return Tokenizer.from_path(str(folder))


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, VOCAB_SIZE, [EOS, IM_END])


def compiled(compiler: GrammarCompiler, **params: Any) -> Grammar:
    constraint = constraint_of(parse_sampling_params(params, VOCAB_SIZE))
    assert constraint is not None
    return compiler.compile(constraint)


def allowed(grammar: Grammar) -> set[int]:
    mask = np.frombuffer(grammar.mask(), np.uint8)
    assert len(mask) == 4 * -(-VOCAB_SIZE // 32)
    return set(np.nonzero(np.unpackbits(mask, bitorder="little"))[0].tolist())


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
def test_random_output_keeps_to_the_schema(compiler: GrammarCompiler, tokenizer: Tokenizer, seed: int) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["x", "y"]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    text = random_walk(compiled(compiler, json_schema=schema), tokenizer, seed)
    assert text is not None, "white space is bounded, so even a random output ends"
    value = json.loads(text)
    assert 0 <= value["a"] <= 99
    assert value["b"] in ("x", "y")


@pytest.mark.parametrize("ebnf", ['root ::= "x" [0-9] "y"', 'start: "x" /[0-9]/ "y"'])
def test_both_grammar_languages(compiler: GrammarCompiler, tokenizer: Tokenizer, ebnf: str) -> None:
    text = random_walk(compiled(compiler, ebnf=ebnf), tokenizer, 0)
    assert text is not None
    assert len(text) == 3
    assert text[0] == "x"
    assert text[2] == "y"


def test_end_is_allowed_exactly_when_complete(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    grammar = compiled(compiler, regex="ab*")
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


def test_complete_output_terminates_without_an_end_token(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    grammar = compiled(compiler, regex="a")
    assert grammar.accept(tokenizer.encode("a", False)[0])
    assert grammar.is_terminated
    assert allowed(grammar) == {EOS, IM_END}


def test_copies_are_independent(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    grammar = compiled(compiler, regex="a[bc]")
    grammar.accept(tokenizer.encode("a", False)[0])
    twin = grammar.copy()
    assert twin.accept(tokenizer.encode("b", False)[0])
    assert twin.is_terminated
    assert not grammar.is_terminated


def test_free_output_has_no_constraint() -> None:
    assert constraint_of(parse_sampling_params({}, VOCAB_SIZE)) is None


def refusal(compiler: GrammarCompiler, constraint: dict[str, Any]) -> str:
    """What is wrong with a constraint: at its start, or with the first mask."""
    with pytest.raises(GrammarError) as caught:
        compiled(compiler, **constraint).mask()
    text = str(caught.value)
    assert text and "\n" not in text and len(text) < 500
    return text


@pytest.mark.parametrize(
    ("constraint", "words"),
    [
        ({"regex": "("}, "unclosed group"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"regex": r"(a)\1"}, "backreferences"),
        ({"json_schema": "{"}, "EOF"),
        ({"json_schema": {"type": "nothing"}}, "nothing"),
        ({"json_schema": "[1]"}, ""),
        ({"json_schema": "\ud83d"}, ""),
        ({"json_schema": {"$ref": "#"}}, "no output"),
        ({"json_schema": {"$ref": "http://127.0.0.1:9/schema.json"}}, "not present"),
        ({"json_schema": {"$ref": "file:///etc/passwd"}}, "not present"),
        ({"json_schema": '{"items":' * 200 + "{}" + "}" * 200}, "recursion"),
        ({"json_schema": {"multipleOf": 10**15 + 37, "type": "integer"}}, "digits"),
        ({"ebnf": "root ::= missing"}, "missing"),
        ({"ebnf": "garbage"}, ""),
        ({"ebnf": "root ::= a\na ::= b\nb ::= a"}, "no output"),
        ({"ebnf": "start: a\na: b\nb: a"}, "no output"),
        ({"ebnf": "start: X\n%import .secret.X"}, "regex"),
        ({"ebnf": "start: X\n%import /etc/passwd.X"}, ""),
        ({"ebnf": "root ::= " + "(" * 3000 + '"a"' + ")" * 3000}, "recursion"),
    ],
)
def test_unusable_constraints(compiler: GrammarCompiler, constraint: dict[str, Any], words: str) -> None:
    if constraint == {"json_schema": "\ud83d"}:
        with pytest.raises(RequestError, match="surrogate"):
            parse_sampling_params(constraint, VOCAB_SIZE)
        return
    assert words in refusal(compiler, constraint)


@pytest.mark.parametrize(
    "constraint",
    [
        {"ebnf": 'root ::= root "a" | "b"'},  # left recursion
        {"ebnf": 'root ::= "" | "a"'},
        {"ebnf": 'root ::= a*\na ::= b*\nb ::= "" | "x"'},
        {"ebnf": 'start: "a"+\n%ignore / +/'},
        {"ebnf": 'root ::= "a"\nunused ::= "b"'},
        {"ebnf": 'start: X\nX: /[0-9]+/\nY: "y"'},
        {"ebnf": "start: X\n%import common.INT -> X"},
        {"regex": r"\p{L}{1,100}\d"},
        {"regex": ".{100000}"},
        {"json_schema": {"type": "array", "items": {"type": "integer"}, "minItems": 1000}},
        {"json_schema": {"type": "string", "maxLength": 10**9}},
        {"json_schema": {"type": "object", "patternProperties": {"^a": {"type": "string"}}}},
    ],
)
def test_unusual_constraints_can_begin(compiler: GrammarCompiler, constraint: dict[str, Any]) -> None:
    assert allowed(compiled(compiler, **constraint))


def test_what_is_too_long_is_not_even_looked_at() -> None:
    for name, limit in (("regex", 64 * 1024), ("ebnf", 512 * 1024), ("json_schema", 512 * 1024)):
        assert constraint_of(SamplingParams(**{name: "a" * limit})) == Constraint(name, "a" * limit)
        with pytest.raises(RequestError, match=f"{limit + 1} bytes; at most {limit}") as caught:
            constraint_of(SamplingParams(**{name: "a" * (limit + 1)}))
        assert caught.value.param == name


def test_tools_beside_a_constraint_do_not_count_as_its_own() -> None:
    assert constraint_of(SamplingParams(regex="a"), "b" * 100_000) == Constraint("regex", "a", "b" * 100_000)
    with pytest.raises(RequestError, match="regex has 1 bytes, and the tools .* make 524288 more") as caught:
        constraint_of(SamplingParams(regex="a"), "b" * (512 * 1024))
    assert caught.value.param == "regex"


def test_a_panic_of_the_library_is_an_error_like_others() -> None:
    class Panic(BaseException):
        """As pyo3 derives its own."""

    def panic() -> None:
        raise Panic("index out of bounds\nbacktrace")

    with pytest.raises(GrammarError, match="^index out of bounds$"):
        call_library(panic)
    with pytest.raises(KeyboardInterrupt):
        call_library(lambda: (_ for _ in ()).throw(KeyboardInterrupt()))


def test_a_tokenizer_with_more_tokens_than_the_model(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    more = [f"<extra{number}>" for number in range(VOCAB_SIZE)]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"additional_special_tokens": more}))
    tokenizer = Tokenizer.from_path(str(tmp_path))
    assert tokenizer.vocab_size > VOCAB_SIZE
    grammar = GrammarCompiler(tokenizer, VOCAB_SIZE, [2]).compile(Constraint("regex", "ab"))
    assert grammar.accept(tokenizer.encode("a")[-1])
