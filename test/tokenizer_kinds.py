"""Small tokenizers of every kind that models have, each written as a model folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from random_models import write_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

SPECIAL = ("<unk>", "<s>", "</s>", "<|end|>")
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = ["▁", "a", "b", "é", "植", ".", "n", "'", "t", "▁a", "ab", "▁.", "▁n't", "▁'", "s"]


def sentencepiece(strip: bool = True) -> Tokenizer:
    """Llama 2's kind, and Gemma's, which strips nothing."""
    vocab = {token: place for place, token in enumerate([*SPECIAL, *BYTES, *WORDS])}
    backend = Tokenizer(models.BPE(vocab, [("▁", "a"), ("a", "b")], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if strip else parts)
    return backend


def unigram() -> Tokenizer:
    """T5's kind: scores for pieces, Metaspace on both sides."""
    backend = Tokenizer(models.Unigram([(token, -1.0) for token in [*SPECIAL, *WORDS]], 0))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return backend


def word_piece() -> Tokenizer:
    """BERT's kind: words, and pieces that go on."""
    words = ["a", "b", "##a", "##b", ".", ",", "'", "s", "n", "##'", "##t", "m", "植", "don", "n't", "'m"]
    vocab = {token: place for place, token in enumerate([*SPECIAL, *words])}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(cleanup=False)
    return backend


def word_ends() -> Tokenizer:
    """The first GPT's kind: the last piece of a word says so."""
    words = ["a", "b", "a</w>", "b</w>", "植</w>", ".</w>"]
    vocab = {token: place for place, token in enumerate([*SPECIAL, *words])}
    backend = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", end_of_word_suffix="</w>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.BPEDecoder()
    return backend


def words_alone() -> Tokenizer:
    """Without a decoder: tokens with spaces between."""
    words = ["a", "b", "植", "."]
    return Tokenizer(models.WordLevel({token: place for place, token in enumerate([*SPECIAL, *words])}, "<unk>"))


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "sentencepiece": sentencepiece,
    "gemma": lambda: sentencepiece(strip=False),
    "unigram": unigram,
    "word_piece": word_piece,
    "word_ends": word_ends,
    "words_alone": words_alone,
}


def write_kind(folder: Path, kind: str, **settings: Any) -> Path:
    """Write a tokenizer of `kind`, one of KINDS or "byte_level", with `settings` in its tokenizer_config.json."""
    if kind == "byte_level":
        write_tokenizer(folder)
    else:
        backend = KINDS[kind]()
        backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
        backend.add_tokens([AddedToken("<tool>", normalized=False)])
        backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
