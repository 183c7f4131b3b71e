"""What sentence-transformers' files beside a decoder say of it, and what is refused of them."""

import json
from pathlib import Path
from typing import Any

import pytest
import random_models as rm
from ramet.srt.configs.model_config import ModelConfig
from ramet.srt.configs.sentence_transformers import EmbeddingConfig, RerankerConfig, read_embedding, read_reranker


def write_modules(folder: Path, *kinds: str) -> None:
    entries = [
        {"idx": i, "path": "" if i == 0 else f"{i}_{kind}", "type": f"a.b.{kind}"} for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(entries))


def write_pooling_config(folder: Path, config: dict[str, Any]) -> None:
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("normalize", [False, True])
def test_pooling_makes_an_embedding_model(tmp_path: Path, normalize: bool) -> None:
    rm.write_pooling(tmp_path, normalize=normalize)
    for wanted in (False, True):
        assert read_embedding(tmp_path, {}, wanted) == EmbeddingConfig(normalize=normalize)
    assert read_reranker(tmp_path) is None


def test_without_files_it_is_as_wanted(tmp_path: Path) -> None:
    assert read_embedding(tmp_path, {}, False) is None
    assert read_embedding(tmp_path, {}, True) == EmbeddingConfig(normalize=True)
    assert read_reranker(tmp_path) is None


@pytest.mark.parametrize(
    "config", [{"pooling_mode": "lasttoken"}, {"pooling_mode": ["lasttoken"]}, {"pooling_mode_lasttoken": True}]
)
def test_spellings_of_the_last_token(tmp_path: Path, config: dict[str, Any]) -> None:
    rm.write_pooling(tmp_path)
    write_pooling_config(tmp_path, config)
    assert read_embedding(tmp_path, {}, False) is not None


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_lasttoken": False}, "got mean_tokens"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_lasttoken": True}, "got lasttoken, mean_tokens"),
        ({"pooling_mode": "cls"}, "got cls"),
        ({}, "no pooling mode"),
    ],
)
def test_other_poolings_are_refused(tmp_path: Path, config: dict[str, Any], words: str) -> None:
    rm.write_pooling(tmp_path)
    write_pooling_config(tmp_path, config)
    with pytest.raises(ValueError, match=f"1_Pooling/config.json: .*last token.*{words}"):
        read_embedding(tmp_path, {}, False)


def test_other_modules_are_refused(tmp_path: Path) -> None:
    rm.write_pooling(tmp_path)
    write_modules(tmp_path, "Transformer", "Pooling", "Dense")
    with pytest.raises(ValueError, match=r"modules\.json: .*Dense"):
        read_embedding(tmp_path, {}, False)
    write_modules(tmp_path, "Transformer", "Dense")
    assert read_embedding(tmp_path, {}, False) is None
    with pytest.raises(ValueError, match="Dense"):
        read_embedding(tmp_path, {}, True)


@pytest.mark.parametrize(
    "content", ["{}", "null", "[1]", '[{"type": 3, "path": ""}]', '[{"type": "a", "path": "../b"}]']
)
def test_broken_modules_are_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "modules.json").write_text(content)
    with pytest.raises(ValueError, match=r"modules\.json"):
        read_embedding(tmp_path, {}, False)


def test_label_tokens_make_a_reranker(tmp_path: Path) -> None:
    rm.write_logit_score(tmp_path, 7, 9)
    assert read_reranker(tmp_path) == RerankerConfig(true_token_id=7, false_token_id=9)
    assert read_embedding(tmp_path, {}, False) is None
    with pytest.raises(ValueError, match="without --is-embedding"):
        read_embedding(tmp_path, {}, True)
    rm.write_logit_score(tmp_path, 7, None)
    with pytest.raises(ValueError, match=r"1_LogitScore/config\.json: .*two tokens.*got 7 and None"):
        read_reranker(tmp_path)


def test_matryoshka(tmp_path: Path) -> None:
    def read(**keys: Any) -> tuple[bool, tuple[int, ...]]:
        config = read_embedding(tmp_path, keys, True)
        assert config is not None
        return config.may_be_cut, config.dimensions

    assert read() == read(is_matryoshka=True) == (True, ())
    assert read(is_matryoshka=False) == (False, ())
    assert read(matryoshka_dimensions=[64, 32]) == (True, (32, 64))
    for keys in ({"is_matryoshka": 1}, {"matryoshka_dimensions": 3}, {"matryoshka_dimensions": [0]}):
        with pytest.raises(ValueError, match=f"'{next(iter(keys))}' must be"):
            read(**keys)


def test_the_model_config_has_it(tmp_path: Path) -> None:
    folder = rm.make_config(tmp_path, "qwen3", is_matryoshka=True)
    assert ModelConfig.from_path(str(folder)).embedding is None
    assert ModelConfig.from_path(str(folder), is_embedding=True).embedding == EmbeddingConfig()
    rm.write_pooling(folder, normalize=False)
    (folder / "config_sentence_transformers.json").write_text('{"default_prompt_name": "query"}')
    assert ModelConfig.from_path(str(folder)).embedding == EmbeddingConfig(normalize=False, default_prompt="query")
