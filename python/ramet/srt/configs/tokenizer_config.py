"""Owns what the JSON files beside tokenizer.json say: special and added tokens, their ids and flags, the end token.

The rules by which the files go together are those of transformers 5. No tokenizer is loaded here.
"""

import json
import os
from typing import Any

SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
BY_NAME, OLD_EXTRA = "named_special_tokens", "additional_special_tokens"  # the first is none of the files'
CONFIG, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"


def read_tokenizer_config(folder: str) -> dict[str, Any]:
    """tokenizer_config.json, completed from special_tokens_map.json and added_tokens.json where it is of the old kind.

    The old kind has no `added_tokens_decoder`; then the map's entries go above its own. With one, both other files
    count for nothing. The result always has `added_tokens_decoder`: {id: {"content": str, flag: bool, …}, …}.

    Raises:
        ValueError: if a file is broken, or an entry isn't of the form that it must have; the message names both.
    """
    config = read_optional_json(folder, CONFIG)
    _check_roles(config, os.path.join(folder, CONFIG))
    by_name, extra = _extra(config)
    if config.get("added_tokens_decoder") is None:
        special_map = read_optional_json(folder, MAP)
        _check_roles(special_map, os.path.join(folder, MAP))
        if (late_extra := special_map.pop(OLD_EXTRA, None)) is not None:
            config[OLD_EXTRA] = late_extra
        more_by_name, more = _extra(special_map)
        special_map.pop("extra_special_tokens", None)
        extra = [] if more_by_name else [*extra, *_all_special(more)]
        by_name |= more_by_name
        config |= {name: _all_special(value) for name, value in special_map.items() if value is not None}
        config["added_tokens_decoder"] = _added_tokens(folder, config, extra)
    config |= {BY_NAME: by_name, "extra_special_tokens": extra or config.get(OLD_EXTRA) or []}
    declared = config["added_tokens_decoder"]
    if not isinstance(declared, dict):
        raise ValueError(f"{os.path.join(folder, CONFIG)}: 'added_tokens_decoder' must be an object")
    try:
        config["added_tokens_decoder"] = {_token_id(key): _token(value) for key, value in declared.items()}
    except ValueError as error:
        raise ValueError(f"{os.path.join(folder, CONFIG)}: 'added_tokens_decoder': {error}") from None
    return config


def _check_roles(config: dict[str, Any], file: str) -> None:
    for name in SPECIAL_TOKEN_NAMES:
        if config.get(name):
            try:
                _token(config[name])
            except ValueError as error:
                raise ValueError(f"{file}: {name!r}: {error}") from None


def named_tokens(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Role -> {"content": …, flags}: the usual roles first, then the model's own ("image_token": …).

    Raises:
        ValueError: if what the config calls its extra special tokens is not of the form that it must have.
    """
    roles = [name for name in SPECIAL_TOKEN_NAMES if config.get(name)]
    own = [name for name, value in config.items() if name.endswith("_token") and name not in SPECIAL_TOKEN_NAMES
           and (isinstance(value, str) or (isinstance(value, dict) and "content" in value))]  # fmt: skip
    tokens = {name: _token(config[name]) for name in (*roles, *own) if config[name]}
    return tokens | {name: _token(value) for name, value in config.get(BY_NAME, {}).items()}


def extra_tokens(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The special tokens without a role, as {"content": …, flags}. Raises what `named_tokens` raises."""
    return [_token(value) for value in config.get("extra_special_tokens") or []]


def read_eos_token_id(folder: str) -> int | None:
    """The id of the tokenizer's `eos_token`, as the files beside and in tokenizer.json give it; None without one.

    Raises:
        ValueError: if a file is broken.
    """
    config = read_tokenizer_config(folder)
    if not config.get("eos_token"):
        return None
    content = _token(config["eos_token"])["content"]
    for token_id, token in config["added_tokens_decoder"].items():
        if token["content"] == content:
            return int(token_id)
    whole = read_optional_json(folder, "tokenizer.json")
    try:
        return _find_id(whole or {"model": {"vocab": read_optional_json(folder, "vocab.json")}}, content)
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{os.path.join(folder, 'tokenizer.json')} is not a tokenizer: {error!r}") from None


def _find_id(whole: dict[str, Any], content: str) -> int | None:
    """The id of a token in the content of tokenizer.json."""
    for token in whole.get("added_tokens") or []:
        if token.get("content") == content:
            return int(token["id"])
    vocab = (whole.get("model") or {}).get("vocab")
    if isinstance(vocab, list):  # a Unigram model's pieces with their scores
        vocab = {piece[0]: place for place, piece in enumerate(vocab)}
    found = (vocab or {}).get(content)
    return found if isinstance(found, int) else None


def read_optional_json(folder: str, name: str) -> dict[str, Any]:
    """The JSON object in file `name` of `folder`; {} if there is no such file.

    Raises:
        ValueError: if the file holds no JSON object; the message names it.
    """
    content = _read_if_there(folder, name)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{os.path.join(folder, name)} must hold a JSON object")
    return content


def read_optional_list(folder: str, name: str) -> list[Any]:
    """As `read_optional_json`, for a file that holds a list."""
    content = _read_if_there(folder, name)
    if content is None:
        return []
    if not isinstance(content, list):
        raise ValueError(f"{os.path.join(folder, name)} must hold a JSON list")
    return content


def _read_if_there(folder: str, name: str) -> Any:
    """The JSON in a file, which may not be null; None if there is no such file."""
    file = os.path.join(folder, name)
    try:
        with open(file, encoding="utf-8") as stream:
            content = json.load(stream)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} can't be read as JSON: {error}") from None
    return False if content is None else content


def _added_tokens(folder: str, config: dict[str, Any], extra: list[Any]) -> dict[int, dict[str, Any]]:
    """added_tokens.json, {content: id, …}, in the form of `added_tokens_decoder`."""
    roles = [config[name] for name in SPECIAL_TOKEN_NAMES if config.get(name)]
    special = {_token(value)["content"] for value in (*roles, *extra)}
    tokens: dict[int, dict[str, Any]] = {}
    for content, token_id in read_optional_json(folder, ADDED).items():
        try:
            token = _token(content)
            tokens[_token_id(token_id)] = {
                **token, "special": content in special, "normalized": content not in special, "legacy": True
            }  # fmt: skip
        except ValueError as error:
            raise ValueError(f"{os.path.join(folder, ADDED)}: {error}") from None
    return tokens


def _extra(config: dict[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    """The extra special tokens that have names, and those that have none: a file's one key has either kind."""
    extra = config.get("extra_special_tokens") or config.get(OLD_EXTRA) or []
    if not isinstance(extra, list | dict):
        raise ValueError(f"{CONFIG}: the extra special tokens must be a list or an object; got {extra!r:.60}")
    return (dict(extra), []) if isinstance(extra, dict) else ({}, extra)


def _all_special(value: Any) -> Any:
    """An entry of the special tokens' map: all tokens that it has are special."""
    if isinstance(value, dict) and "content" in value:
        return {**value, "special": True}
    return [_all_special(one) for one in value] if isinstance(value, list) else value


def _token_id(value: Any) -> int:
    text = str(value)
    if isinstance(value, bool) or not text.isdecimal():
        raise ValueError(f"{value!r:.60} is not a token id")
    return int(text)


def _token(value: Any) -> dict[str, Any]:
    """A token with those of its flags that were given."""
    fields = {"content": value} if isinstance(value, str) else value
    if not isinstance(fields, dict) or not isinstance(fields.get("content"), str) or not fields["content"]:
        raise ValueError(f"{value!r:.60} is not a token: a text, or an object with its text as 'content'")
    flags = {name: fields[name] for name in (*TOKEN_FLAGS, "legacy") if fields.get(name) is not None}
    wrong = next((name for name, flag in flags.items() if not isinstance(flag, bool)), None)
    if wrong is not None:
        raise ValueError(f"{wrong} of {fields['content']!r:.60} must be true or false; got {flags[wrong]!r:.60}")
    return {"content": fields["content"], **flags}
