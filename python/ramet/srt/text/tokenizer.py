"""Owns the tokenizer of a model folder: text to token ids and back. No torch, and transformers only if it must."""

import json
import os
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer as BackendTokenizer

from ramet.srt.configs.tokenizer_config import read_tokenizer_config
from ramet.srt.errors import RequestError, one_line
from ramet.srt.text.added_tokens import add_declared_tokens, token_of_role
from ramet.srt.text.boundaries import (
    Boundaries,
    ByteRunBoundaries,
    CharacterBoundaries,
    LastTokenBoundaries,
    NoBoundaries,
    byte_level_bytes,
    fallback_byte,
)
from ramet.srt.text.chat_template import ChatTemplate
from ramet.srt.text.chat_template_files import read_chat_template
from ramet.srt.text.clean_up import clean_up
from ramet.srt.text.prefix_space import apply_prefix_space

# They treat each token by itself, or are asked where a text may be cut (boundaries.py).
KNOWN_DECODERS = frozenset(
    {"ByteLevel", "ByteFallback", "Fuse", "Metaspace", "Replace", "Sequence", "Strip", "WordPiece"}
)
# Classes whose add_bos_token counts; the others leave the marks to tokenizer.json. add_eos_token counts in none.
MARKING_CLASSES = frozenset({"LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "CohereTokenizer"})


class Tokenizer:
    """A tokenizer and its chat template, as `from_path` finds them in a model folder."""

    def __init__(self, backend: BackendTokenizer, config: dict[str, Any], chat_template: ChatTemplate | None = None):
        self._backend = backend
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = bool(config.get("split_special_tokens", False))
        self.special_tokens = token_of_role(config)
        add_declared_tokens(backend, config)
        apply_prefix_space(backend, config)
        self.chat_template = chat_template
        name = str(config.get("tokenizer_class", "")).removesuffix("Fast")
        self._add_bos = config.get("add_bos_token") if name in MARKING_CLASSES else None
        self.cleans_up = _cleans_up(backend, config)
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)

    @classmethod
    def from_path(cls, folder: str, chat_template_file: str | None = None) -> "Tokenizer":
        """Read tokenizer.json, the JSON files that stand beside it and the chat template from `folder`.

        A folder without tokenizer.json is left to transformers, which converts older formats.

        Raises:
            ValueError: if there is no tokenizer or one of the files is broken; the message names the file.
        """
        config = read_tokenizer_config(folder)
        file = os.path.join(folder, "tokenizer.json")
        if os.path.isfile(file):
            try:
                backend = BackendTokenizer.from_file(file)
            except Exception as error:  # noqa: BLE001 - the library raises plain Exception
                raise ValueError(f"{file} can't be read: {error}") from None
        else:
            backend = _convert_with_transformers(folder)
        return cls(backend, config, read_chat_template(folder, config, chat_template_file))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; with the model's begin-of-sequence token and such where `add_special_tokens`.

        Raises:
            RequestError: if the library fails at this text.
        """
        try:
            # Unlike `encode` it lets go of Python's lock, and leaves out the tokens' places, which take most time.
            (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # of its native code, and no Exception
                raise
            raise RequestError(f"the model's tokenizer can't encode this text: {one_line(error)}") from None
        ids: list[int] = encoding.ids
        if add_special_tokens:
            ids = self._with_bos(ids)
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of `token_ids`; bytes that are no UTF-8 become replacement characters, unknown ids nothing."""
        text = self.decode_raw(token_ids, skip_special_tokens)
        return clean_up(text) if self.cleans_up else text

    def decode_raw(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """As `decode`, without the cleaning that some tokenizers ask for: what follows never changes it."""
        return self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def token(self, token_id: int) -> str | None:
        """The token as the vocabulary has it; None for an id that no token has."""
        return self._backend.id_to_token(token_id)

    def is_special(self, token_id: int) -> bool:
        """Whether the token is one that is skipped where special tokens are."""
        return token_id in self._special_ids

    def holds_special_token(self, text: str) -> bool:
        """Whether `text` contains a special token's text."""
        return self._special_pattern is not None and self._special_pattern.search(text) is not None

    def boundaries(self) -> Boundaries:
        """A new watch over where the text of a growing sequence may be cut."""
        if self._decoders - KNOWN_DECODERS or self._strips_ends:
            return LastTokenBoundaries()
        if "ByteFallback" in self._decoders:
            return ByteRunBoundaries()
        return CharacterBoundaries(BYTE_OF_CHARACTER) if "ByteLevel" in self._decoders else NoBoundaries()

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that the token stands for, in the middle of a text; b"" for an id that stands for none."""
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if "ByteLevel" in self._decoders:
            return byte_level_bytes(token, BYTE_OF_CHARACTER)
        if token_id in self._special_ids:
            return token.encode()
        byte = fallback_byte(token) if "ByteFallback" in self._decoders else None
        if byte is not None:
            return bytes([byte])
        context = [] if self.anchor_id is None else [self.anchor_id]
        return self.decode_raw([*context, token_id])[len(self.decode_raw(context)) :].encode()

    def to_json(self, vocab_size: int | None = None) -> str:
        """The tokenizer as a tokenizer.json, without added tokens that a model of `vocab_size` can't give."""
        text = self._backend.to_str()
        if vocab_size is None or self.vocab_size <= vocab_size:
            return text
        content = json.loads(text)
        content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < vocab_size]
        return json.dumps(content)

    def special_token_id(self, name: str) -> int | None:
        """Id of "bos_token", "eos_token", …; None when the model has none."""
        token = self.special_tokens.get(name)
        return None if token is None else self._backend.token_to_id(token)

    @cached_property
    def anchor_id(self) -> int | None:
        """A token that is text by itself: what is decoded behind it stands in the middle of a text.

        None where the vocabulary has no such token, and where it makes no difference.
        """
        if self._decoders == {"ByteLevel"}:
            return None
        for token_id in range(self.vocab_size):
            token = self._backend.id_to_token(token_id)
            if token is not None and re.fullmatch(r"[0-9A-Za-z]+", token) and token_id not in self._special_ids:
                return token_id
        return None

    @cached_property
    def broken_byte_id(self) -> int | None:
        """The token of a byte that no UTF-8 text has, where the vocabulary has one."""
        return self._backend.token_to_id("<0xFF>")

    @cached_property
    def special_ids_by_text(self) -> dict[str, int]:
        """Text -> id of the tokens that are skipped where special tokens are."""
        tokens = {token_id: self._backend.id_to_token(token_id) for token_id in sorted(self._special_ids)}
        return {token: token_id for token_id, token in tokens.items() if token}

    def _with_bos(self, ids: list[int]) -> list[int]:
        """Apply add_bos_token, which stands above what tokenizer.json does by itself."""
        bos = self.special_token_id("bos_token")
        if self._add_bos is None or bos is None:
            return ids
        has_bos = ids[:1] == [bos]
        if self._add_bos and not has_bos:
            return [bos, *ids]
        return ids[1:] if has_bos and not self._add_bos else ids

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        """Those that the backend skips, which needn't be those that say so: it goes by what was said first."""
        added, decode = self._backend.get_added_tokens_decoder(), self._backend.decode
        shown = {i: decode([i, i], skip_special_tokens=False) for i in added}  # twice: a space shows between others
        return frozenset(
            i for i, token in added.items()
            if (decode([i, i], skip_special_tokens=True) != shown[i] if shown[i] else token.special)
        )  # fmt: skip

    @cached_property
    def _special_pattern(self) -> "re.Pattern[str] | None":
        texts = [token for token_id in self._special_ids if (token := self._backend.id_to_token(token_id))]
        return re.compile("|".join(map(re.escape, texts))) if texts else None

    @cached_property
    def _decoders(self) -> frozenset[str]:
        """Types of the decoder and the decoders that it is made of."""
        return frozenset(decoder["type"] for decoder in self._decoder_parts)

    @cached_property
    def _strips_ends(self) -> bool:
        return any(decoder["type"] == "Strip" and decoder["stop"] for decoder in self._decoder_parts)

    @cached_property
    def _decoder_parts(self) -> list[dict[str, Any]]:
        if self._backend.decoder is None:
            return []
        found, waiting = [], [json.loads(self._backend.decoder.__getstate__())]
        while waiting:
            decoder = waiting.pop()
            found.append(decoder)
            waiting.extend(decoder.get("decoders", ()))
        return found


def _byte_of_character() -> dict[str, int]:
    """The byte-level alphabet of GPT-2: printable Latin-1 stands for itself, the other bytes for U+0100 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(0x100 + place): byte for place, byte in enumerate(others)})
    return alphabet


BYTE_OF_CHARACTER = _byte_of_character()


def _cleans_up(backend: BackendTokenizer, config: dict[str, Any]) -> bool:
    """Whether spaces before punctuation are taken out: asked for, and no BPE, whose texts it would only damage."""
    if not config.get("clean_up_tokenization_spaces"):
        return False
    is_bpe = type(backend.model).__name__ == "BPE"
    return not is_bpe or bool(config.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"))


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
    except Exception as error:  # noqa: BLE001 - its converters raise whatever their libraries do
        raise ValueError(
            f"{folder} has no tokenizer.json, which AutoTokenizer's save_pretrained writes, and transformers can't "
            f"read the older files here: {one_line(error)}"
        ) from None
    backend = getattr(converted, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"{folder} has no tokenizer.json, and its tokenizer has no fast form")
    return backend
