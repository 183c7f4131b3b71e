"""Owns the reading of what sentence-transformers writes beside a decoder: whether it makes embeddings, or ranks texts.

The files are modules.json and a config.json in each module's folder, as sentence-transformers 2 to 5 write them:
https://sbert.net/docs/sentence_transformer/usage/custom_models.html, and /cross_encoder/ there for rerankers.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ramet.srt.configs.tokenizer_config import read_optional_json, read_optional_list

MODULES, MODULE_CONFIG = "modules.json", "config.json"
PROMPTS = "config_sentence_transformers.json"
MATRYOSHKA_KEYS = ("is_matryoshka", "matryoshka_dimensions")  # of config.json
OLD_MODE, NEW_MODE = "pooling_mode_", "pooling_mode"  # older files have a flag for each mode
LAST_TOKEN = "lasttoken"


@dataclass(frozen=True, kw_only=True)
class EmbeddingConfig:
    """How the hidden state of a prompt's last token becomes its embedding."""

    normalize: bool = True  # to length 1
    may_be_cut: bool = True  # whether a shorter one is made of its first numbers
    dimensions: tuple[int, ...] = ()  # if it may be cut: to one of these; empty: to any length
    default_prompt: str | None = None  # the name of a prompt that sentence-transformers, and nobody here, puts before


@dataclass(frozen=True, kw_only=True)
class RerankerConfig:
    """The tokens whose log-probabilities behind a query and a document say whether the document is relevant."""

    true_token_id: int
    false_token_id: int


def read_embedding(path: str, hf_config: Mapping[str, Any], wanted: bool) -> EmbeddingConfig | None:
    """How the model in folder `path` makes embeddings; None for one that generates text.

    Args:
        hf_config: its config.json.
        wanted: whether it is to make some though no file says that it does: then by its last token, normalised.

    Raises:
        ValueError: if the files ask for what isn't supported, or the model is made for something else than is wanted.
    """
    modules = _read_modules(path)
    kinds = [kind for kind, _ in modules]
    file = os.path.join(path, MODULES)
    if "LogitScore" in kinds:
        if wanted:
            raise ValueError(f"{file} says that the model ranks texts: start it without --is-embedding")
        return None
    if "Pooling" not in kinds and not wanted:
        return None
    if unknown := [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]:
        raise ValueError(f"{file}: embeddings that go through a module of the kind {unknown[0]} are not supported")
    for kind, folder in modules:
        if kind == "Pooling":
            _check_pooling(os.path.join(path, folder))
    may_be_cut, dimensions = _read_matryoshka(hf_config, os.path.join(path, "config.json"))
    return EmbeddingConfig(
        normalize="Normalize" in kinds or "Pooling" not in kinds,
        may_be_cut=may_be_cut,
        dimensions=dimensions,
        default_prompt=read_optional_json(path, PROMPTS).get("default_prompt_name"),
    )


def read_reranker(path: str) -> RerankerConfig | None:
    """The label tokens of the model in folder `path`; None if no file says that it ranks texts.

    Raises:
        ValueError: if it gives scores that are not supported.
    """
    for kind, folder in _read_modules(path):
        if kind != "LogitScore":
            continue
        config = read_optional_json(os.path.join(path, folder), MODULE_CONFIG)
        true_id, false_id = config.get("true_token_id"), config.get("false_token_id")
        if type(true_id) is not int or type(false_id) is not int:
            raise ValueError(
                f"{os.path.join(path, folder, MODULE_CONFIG)}: scores are supported that compare two tokens, which "
                f"'true_token_id' and 'false_token_id' must name; got {true_id!r:.60} and {false_id!r:.60}"
            )
        return RerankerConfig(true_token_id=true_id, false_token_id=false_id)
    return None


def _read_modules(path: str) -> list[tuple[str, str]]:
    """Kind and folder of each module in their order; empty without modules.json.

    The kind is the last part of the class's dotted name, which has moved from one package to another.
    """
    modules = []
    for entry in read_optional_list(path, MODULES):
        kind, folder = (entry.get("type"), entry.get("path", "")) if isinstance(entry, dict) else (None, None)
        if not isinstance(kind, str) or not isinstance(folder, str) or ".." in folder.split("/"):
            raise ValueError(f"{os.path.join(path, MODULES)}: each module needs a 'type' and a 'path' in the folder")
        modules.append((kind.rpartition(".")[2], folder.lstrip("/")))
    return modules


def _check_pooling(folder: str) -> None:
    """Raises ValueError unless the last token's hidden state is what counts, alone."""
    config = read_optional_json(folder, MODULE_CONFIG)
    given = config.get(NEW_MODE)
    modes = {str(mode) for mode in (given if isinstance(given, list) else [given]) if mode is not None}
    modes |= {name.removeprefix(OLD_MODE) for name, value in config.items() if name.startswith(OLD_MODE) and value}
    if modes != {LAST_TOKEN}:
        raise ValueError(
            f"{os.path.join(folder, MODULE_CONFIG)}: embeddings by the last token's hidden state are supported "
            f"(pooling_mode_{LAST_TOKEN}); got {', '.join(sorted(modes)) or 'no pooling mode'}"
        )


def _read_matryoshka(hf_config: Mapping[str, Any], file: str) -> tuple[bool, tuple[int, ...]]:
    """Whether embeddings may be cut, and the lengths if only some are allowed. Where nothing says so, they may."""
    flag, lengths = (hf_config.get(name) for name in MATRYOSHKA_KEYS)
    if flag is not None and not isinstance(flag, bool):
        raise ValueError(f"{file}: 'is_matryoshka' must be true or false; got {flag!r:.60}")
    if lengths is None:
        return flag is not False, ()
    if not isinstance(lengths, list) or not all(type(length) is int and length > 0 for length in lengths):
        raise ValueError(f"{file}: 'matryoshka_dimensions' must be a list of positive integers; got {lengths!r:.60}")
    return flag is not False, tuple(sorted(set(lengths)))
