"""Owns the tokenizer of a model folder: text to token ids and back. No torch, and transformers only if it must."""

import json
import os
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as BackendTokenizer

from ramet.srt.text.chat_template import ChatTemplate

SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """A tokenizer and its chat template, as `from_path` finds them in a model folder."""

    def __init__(self, backend: BackendTokenizer, config: dict[str, Any], chat_template: ChatTemplate | None = None):
        self._backend = backend
        self._backend.no_truncation()
        self._backend.no_padding()
        self.special_tokens = _special_tokens(config)
        _add_missing_tokens(backend, config, self.special_tokens)
        self.chat_template = chat_template
        self._add_bos = config.get("add_bos_token")
        self._add_eos = config.get("add_eos_token")
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)

    @classmethod
    def from_path(cls, folder: str, chat_template_file: str | None = None) -> "Tokenizer":
        """Read tokenizer.json, tokenizer_config.json, special_tokens_map.json and the chat template from `folder`.

        A folder without tokenizer.json is left to transformers, which converts older formats.

        Raises:
            ValueError: if there is no tokenizer or one of the files is broken; the message names the file.
        """
        config = {**_read_json(folder, "special_tokens_map.json"), **_read_json(folder, "tokenizer_config.json")}
        file = os.path.join(folder, "tokenizer.json")
        if os.path.isfile(file):
            try:
                backend = BackendTokenizer.from_file(file)
            except Exception as error:  # noqa: BLE001 - the library raises plain Exception
                raise ValueError(f"{file} can't be read: {error}") from None
        else:
            backend = _convert_with_transformers(folder)
        return cls(backend, config, _chat_template(folder, config, chat_template_file))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; with the model's begin-of-sequence token and such where `add_special_tokens`."""
        # Unlike `encode` it lets go of Python's lock, and it leaves out the places of the tokens, which take most time.
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        if add_special_tokens:
            ids = self._with_marks(ids)
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of `token_ids`; bytes that are no UTF-8 become replacement characters, unknown ids nothing."""
        return self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that the token stands for, in the middle of a text; b"" for an id that stands for none."""
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if token_id in self._added_tokens:
            return token.encode()
        if "ByteLevel" in self._decoders:
            return bytes(BYTE_OF_CHARACTER[char] for char in token if char in BYTE_OF_CHARACTER)
        if "ByteFallback" in self._decoders:
            if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                return bytes([int(token[3:5], 16)])
            return token.replace("\u2581", " ").encode()
        return self.decode([token_id]).encode()

    def to_json(self) -> str:
        """The whole tokenizer in the format of tokenizer.json."""
        return self._backend.to_str()

    def special_token_id(self, name: str) -> int | None:
        """Id of "bos_token", "eos_token", …; None when the model has none."""
        token = self.special_tokens.get(name)
        return None if token is None else self._backend.token_to_id(token)

    def _with_marks(self, ids: list[int]) -> list[int]:
        """Apply add_bos_token and add_eos_token, which stand above what tokenizer.json does by itself."""
        bos, eos = self.special_token_id("bos_token"), self.special_token_id("eos_token")
        if self._add_bos is not None and bos is not None:
            has_bos = ids[:1] == [bos]
            if self._add_bos and not has_bos:
                ids = [bos, *ids]
            elif not self._add_bos and has_bos:
                ids = ids[1:]
        if self._add_eos and eos is not None and ids[-1:] != [eos]:
            ids = [*ids, eos]
        return ids

    @cached_property
    def _added_tokens(self) -> dict[int, AddedToken]:
        return self._backend.get_added_tokens_decoder()

    @cached_property
    def _decoders(self) -> frozenset[str]:
        """Types of the decoder and the decoders that it is made of."""
        if self._backend.decoder is None:
            return frozenset()
        found: set[str] = set()
        waiting = [json.loads(self._backend.decoder.__getstate__())]
        while waiting:
            decoder = waiting.pop()
            found.add(decoder["type"])
            waiting.extend(decoder.get("decoders", ()))
        return frozenset(found)


def _byte_of_character() -> dict[str, int]:
    """The byte-level alphabet of GPT-2: printable Latin-1 stands for itself, the other bytes for U+0100 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(0x100 + place): byte for place, byte in enumerate(others)})
    return alphabet


BYTE_OF_CHARACTER = _byte_of_character()


def _read_json(folder: str, name: str) -> dict[str, Any]:
    file = os.path.join(folder, name)
    try:
        with open(file, encoding="utf-8") as stream:
            content = json.load(stream)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} can't be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object")
    return content


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Role -> token: {"bos_token": "<s>", …}."""
    tokens = {}
    for name in SPECIAL_TOKEN_NAMES:
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str) and text:
            tokens[name] = text
    return tokens


def _add_missing_tokens(backend: BackendTokenizer, config: dict[str, Any], special_tokens: dict[str, str]) -> None:
    """Add what tokenizer_config.json declares beyond tokenizer.json, and mark the special tokens as special."""
    declared = config.get("added_tokens_decoder") or {}
    for token_id, token in sorted(declared.items(), key=lambda item: int(item[0])):
        if backend.token_to_id(token["content"]) is None:
            flags = {name: token[name] for name in ("single_word", "lstrip", "rstrip", "normalized") if name in token}
            added = AddedToken(token["content"], **flags)
            (backend.add_special_tokens if token.get("special") else backend.add_tokens)([added])
            if backend.token_to_id(token["content"]) != int(token_id):
                raise ValueError(f"tokenizer_config.json: added token {token['content']!r} can't get the id {token_id}")
    known = backend.get_added_tokens_decoder()
    for text in special_tokens.values():
        found = backend.token_to_id(text)
        if found is not None and not (found in known and known[found].special):
            backend.add_special_tokens([AddedToken(text, normalized=False)])


def _chat_template(folder: str, config: dict[str, Any], template_file: str | None) -> ChatTemplate | None:
    """The template of `template_file`, else of chat_template.jinja, else of tokenizer_config.json."""
    source: Any
    file = template_file or os.path.join(folder, "chat_template.jinja")
    if os.path.isfile(file):
        with open(file, encoding="utf-8") as stream:
            source = stream.read()
    else:
        source = config.get("chat_template") or _read_json(folder, "chat_template.json").get("chat_template")
        if isinstance(source, list):
            source = {entry["name"]: entry["template"] for entry in source}.get("default")
        file = os.path.join(folder, "tokenizer_config.json")
    return ChatTemplate(source, _special_tokens(config), file) if source else None


def _convert_with_transformers(folder: str) -> BackendTokenizer:
    """Raises ValueError if the folder has no tokenizer that transformers can turn into a fast one."""
    older_formats = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
    if not any(os.path.isfile(os.path.join(folder, name)) for name in older_formats):
        raise ValueError(f"{folder} has no tokenizer.json")
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise ValueError(f"{folder} has no tokenizer.json, and transformers, which reads others, is missing") from None
    try:
        converted = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"{folder} has no tokenizer.json, and transformers can't read it: {error}") from None
    backend = getattr(converted, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"{folder} has no tokenizer.json, and its tokenizer has no fast form")
    return backend
