"""What tools write into JSON schemas: taken where it can be kept to or says nothing, refused by the rest's name."""

import json
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field, SecretStr
from ramet.srt.sampling.constraint import Constraint
from ramet.srt.sampling.grammar import GrammarCompiler, GrammarError
from ramet.srt.text import regex
from ramet.srt.text.json_schema import DECIMAL, adapt_schema
from ramet.srt.text.tokenizer import Tokenizer
from random_models import EOS, IM_END, write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(Path(folder))
    return Tokenizer.from_path(str(folder))


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, 331, [EOS, IM_END])


@pytest.fixture
def takes(tokenizer: Tokenizer, compiler: GrammarCompiler) -> Any:
    def check(schema: Any, value: Any, name: str = "json_schema") -> bool:
        """Whether an answer with this value keeps to the schema."""
        text = schema if isinstance(schema, str) else json.dumps(schema)
        grammar = compiler.compile(Constraint(name, text))
        answer = value if name == "regex" else json.dumps(value)
        return all(grammar.accept(token_id) for token_id in [*tokenizer.encode(answer, False), EOS])

    return check


class Leaf(BaseModel):
    """A leaf."""

    kind: Literal["leaf"] = "leaf"
    colour: str = Field("green", examples=["red"], title="Its colour")


class Root(BaseModel):
    kind: Literal["root"] = "root"
    depth: Annotated[float, Field(gt=0, le=9.5)]


class Plant(BaseModel):
    """What pydantic has keywords for."""

    parts: list[Annotated[Leaf | Root, Field(discriminator="kind")]]
    tags: set[Literal["old", "new"]]
    price: Decimal
    secret: SecretStr
    path: Path
    pair: tuple[int, str]
    heights: dict[Literal["min", "max"], int]
    codes: dict[Annotated[str, Field(pattern=r"^[a-c]{2}$")], bool]
    parent: "Plant | None" = None


PLANT: dict[str, Any] = {
    "parts": [{"kind": "leaf", "colour": "red"}, {"kind": "root", "depth": 9.5}],
    "tags": ["old", "old"],  # nothing keeps the model from saying it twice
    "price": "1.25",
    "secret": "x",
    "path": "a/b",
    "pair": [1, "a"],
    "heights": {"min": 1},
    "codes": {"ab": True},
}


GOOD: list[dict[str, Any]] = [{}, {"price": 2}, {"codes": {}}, {"parent": PLANT}]
BAD: list[dict[str, Any]] = [
    {"tags": ["middle"]}, {"heights": {"mean": 1}}, {"codes": {"ab": 1}}, {"parts": [{"kind": "stem"}]},
    {"parts": [{"kind": "root", "depth": 9.6}]}, {"pair": ["a", 1]},
]  # fmt: skip


@pytest.mark.parametrize(("changes", "is_taken"), [(GOOD, True), (BAD, False)], ids=["good", "bad"])
def test_what_pydantic_writes(takes: Any, changes: list[dict[str, Any]], is_taken: bool) -> None:
    schema = Plant.model_json_schema()
    for change in changes:
        assert takes(schema, PLANT | change) is is_taken, change


@pytest.mark.parametrize(("texts", "is_taken"), [(["1", "-0.5", "+.5", "10."], True), ([".", "1.2.3", "", "-"], False)])
def test_decimal_numbers_without_a_look_ahead(takes: Any, texts: list[str], is_taken: bool) -> None:
    for text in texts:
        assert takes({"type": "string", "pattern": DECIMAL}, text) is is_taken, text


def test_names_of_properties(takes: Any) -> None:
    schema = {"type": "object", "propertyNames": {"pattern": "^[a-c]{2}$"}, "additionalProperties": {"type": "integer"}}
    assert takes(schema, {"ab": 1, "cc": 2}) and takes(schema, {})
    assert not takes(schema, {"abc": 1}) and not takes(schema, {"ab": "1"})
    assert takes({"type": "object", "propertyNames": {"type": "string"}}, {"any": "thing"})


def test_annotations_say_nothing(takes: Any) -> None:
    schema = {"type": "string", "deprecated": True, "readOnly": True, "format": "password", "contentEncoding": "base64"}
    assert takes(schema, "x")
    assert takes("true", {"a": [1]})


def test_a_keyword_is_one_only_where_a_schema_stands(takes: Any) -> None:
    schema = {"properties": {"uniqueItems": {"const": 1}, "format": {"enum": [{"format": "x"}]}}, "type": "object",
              "required": ["uniqueItems", "format"], "additionalProperties": False}  # fmt: skip
    assert json.loads(adapt_schema(json.dumps(schema))) == schema
    assert takes(schema, {"uniqueItems": 1, "format": {"format": "x"}})


@pytest.mark.parametrize(
    "keyword",
    [{"not": {"type": "string"}}, {"if": {}, "then": {}}, {"contains": {}}, {"dependentRequired": {"a": ["b"]}},
     {"propertyNames": {"maxLength": 3}}, {"unevaluatedProperties": False}],
    ids=str,
)  # fmt: skip
def test_what_can_not_be_kept_to_is_refused_by_name(compiler: GrammarCompiler, keyword: dict[str, Any]) -> None:
    with pytest.raises(GrammarError, match=next(iter(keyword))):
        compiler.compile(Constraint("json_schema", json.dumps({"type": "object"} | keyword)))


def test_what_is_no_json_is_left_to_the_library(compiler: GrammarCompiler) -> None:
    with pytest.raises(GrammarError):
        compiler.compile(Constraint("json_schema", "{"))
    with pytest.raises(GrammarError):
        compiler.compile(Constraint("json_schema", '{"items":' * 100_000 + "{}" + "}" * 100_000))


def test_a_regex_of_texts_matches_them_alone(takes: Any) -> None:
    texts = ["a.b", "c|d", "(e)", "[f]{2}^$*+?", "back\\slash", "two\nlines", "-&~#", "g/h"]
    for text in texts:
        assert takes(regex.one_of(texts), text, "regex")
    for text in ("axb", "c", "ff"):
        assert not takes(regex.one_of(texts), text, "regex")
