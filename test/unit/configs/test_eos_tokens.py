"""The tokens that end an answer: those of config.json, generation_config.json and the tokenizer's files together."""

import json
from pathlib import Path
from typing import Any

import pytest
from ramet.srt.configs.model_config import ModelConfig
from ramet.srt.configs.tokenizer_config import read_eos_token_id
from ramet.srt.text.tokenizer import Tokenizer
from random_models import make_config, write_tokenizer
from tokenizer_kinds import KINDS, write_kind


def write(folder: Path, name: str, content: Any) -> None:
    (folder / name).write_text(json.dumps(content))


def configure(folder: Path, **settings: Any) -> None:
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text()) | settings
    write(folder, file.name, {name: value for name, value in config.items() if value is not None})


@pytest.fixture
def model(tmp_path: Path) -> Path:
    make_config(tmp_path, "qwen2", eos_token_id=None)
    write_tokenizer(tmp_path)
    configure(tmp_path, eos_token=None)
    return tmp_path


def eos_ids(model: Path, **options: Any) -> tuple[int, ...]:
    return ModelConfig.from_path(str(model), **options).eos_token_ids


def test_all_three_files_count(model: Path) -> None:
    assert eos_ids(model) == ()
    configure(model, eos_token="<|im_end|>")
    assert eos_ids(model) == (4,)
    write(model, "generation_config.json", {"eos_token_id": [2, 4]})
    assert eos_ids(model) == (2, 4)
    make_config(model, "qwen2", eos_token_id=3)
    assert eos_ids(model) == (3, 2, 4)


def test_the_tokenizer_may_lie_elsewhere(model: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(other)
    assert eos_ids(model, tokenizer_path=str(other)) == (2,)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"special_tokens_map.json": {"eos_token": "<|im_end|>"}}, 4),
        ({"special_tokens_map.json": {"eos_token": {"content": "<|im_end|>", "lstrip": False}}}, 4),
        ({"special_tokens_map.json": {"eos_token": "<new>"}, "added_tokens.json": {"<new>": 320}}, 320),
        ({"tokenizer_config.json": {"eos_token": "<new>", "added_tokens_decoder": {"320": {"content": "<new>"}}}}, 320),
        ({"tokenizer_config.json": {"eos_token": {"__type": "AddedToken", "content": "a"}}}, 69),
        ({"tokenizer_config.json": {"eos_token": "<new>"}, "added_tokens.json": {"<new>": 400}}, 400),
        ({"tokenizer_config.json": {"eos_token": "<nowhere>"}}, None),
        ({"tokenizer_config.json": {"eos_token": "<|im_end|>", "added_tokens_decoder": {}},
          "special_tokens_map.json": {"eos_token": "</s>"}}, 4),
    ],
)  # fmt: skip
def test_where_a_tokenizer_names_its_end_token(model: Path, files: dict[str, Any], expected: int | None) -> None:
    for name, content in files.items():
        write(model, name, content)
    assert read_eos_token_id(str(model)) == expected
    assert eos_ids(model) == ((expected,) if expected is not None and expected < 331 else ())
    if expected in (4, 69, 320):
        assert Tokenizer.from_path(str(model)).special_token_id("eos_token") == expected


@pytest.mark.parametrize("kind", list(KINDS))
def test_both_readers_agree_for_every_kind(kind: str, tmp_path: Path) -> None:
    folder = str(write_kind(tmp_path, kind, eos_token="<|end|>"))
    assert read_eos_token_id(folder) == Tokenizer.from_path(folder).special_token_id("eos_token")
    folder = str(write_kind(tmp_path, kind, eos_token="a"))
    assert read_eos_token_id(folder) == Tokenizer.from_path(folder).special_token_id("eos_token")


@pytest.mark.parametrize("value", ["</s>", 2.5, True, [2, "x"], {}])
def test_an_end_token_that_is_no_id_is_named(model: Path, value: Any) -> None:
    write(model, "generation_config.json", {"eos_token_id": value})
    with pytest.raises(ValueError, match=r"generation_config\.json: 'eos_token_id' must be a token id"):
        eos_ids(model)


@pytest.mark.parametrize("tokenizer", [{"added_tokens": "x"}, {"added_tokens": [5]}, {"model": {"vocab": [[], 5]}}])
def test_a_tokenizer_that_is_none_is_named(model: Path, tokenizer: dict[str, Any]) -> None:
    configure(model, eos_token="<new>")
    write(model, "tokenizer.json", tokenizer)
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
        read_eos_token_id(str(model))
