"""Streams of every kind of tokenizer: the pieces are the whole, spaces stay, and special tokens can stop them."""

import random
from pathlib import Path

import pytest
from ramet.srt.text.clean_up import CleanUp, clean_up
from ramet.srt.text.incremental_decode import IncrementalDecoder, TextStream, prompt_tail
from ramet.srt.text.tokenizer import Tokenizer
from tokenizer_kinds import KINDS, write_kind


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in (*KINDS, "byte_level")}
    return {kind: Tokenizer.from_path(str(write_kind(folder, kind))) for kind, folder in folders.items()}


def streamed(tokenizer: Tokenizer, prompt: list[int], ids: list[int], skip: bool, sizes: list[int]) -> str:
    decoder, text, place = IncrementalDecoder(tokenizer, prompt_tail(tokenizer, prompt, skip), skip), "", 0
    while place < len(ids):
        size = sizes[place % len(sizes)]
        text += decoder.push(ids[place : place + size], final=place + size >= len(ids))
        place += size
    return text


@pytest.mark.parametrize("kind", [*KINDS, "byte_level"])
@pytest.mark.parametrize("clean", [False, True])
def test_pieces_of_any_tokens_are_the_whole(kind: str, clean: bool, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_path(str(write_kind(tmp_path, kind, clean_up_tokenization_spaces=clean)))
    chance = random.Random(kind)
    for _ in range(30):
        # Special tokens, ids that nothing has, and in vocabularies with 256 byte tokens the words behind them.
        choices = (
            range(4),
            range(tokenizer.vocab_size + 2),
            range(max(4, tokenizer.vocab_size - 14), tokenizer.vocab_size),
        )
        ids = [chance.choice(chance.choice(choices)) for _ in range(chance.randint(1, 24))]
        cut = 0 if clean else chance.choice([0, chance.randrange(len(ids))])
        for skip in (True, False):
            before = tokenizer.decode(ids[:cut], skip)
            expected = tokenizer.decode(ids, skip)[len(before) :]
            assert streamed(tokenizer, ids[:cut], ids[cut:], skip, [1]) == expected, (ids, cut, skip)
            assert streamed(tokenizer, ids[:cut], ids[cut:], skip, [1, 3, 2]) == expected, (ids, cut, skip)


@pytest.mark.parametrize("num_special", [1, 5, 40])
@pytest.mark.parametrize("kind", ["sentencepiece", "unigram", "word_piece"])
def test_a_word_keeps_its_space_behind_special_tokens(kinds: dict[str, Tokenizer], kind: str, num_special: int) -> None:
    tokenizer = kinds[kind]
    word = tokenizer.encode("a", add_special_tokens=False)
    assert streamed(tokenizer, word + [3] * num_special, word, True, [1]) == " a"
    assert streamed(tokenizer, word, [3] * num_special + word, True, [1]) == " a"
    assert streamed(tokenizer, [3] * num_special, word, True, [1]) == "a", "the first word of all"


def test_bytes_that_are_no_text_come_at_once(kinds: dict[str, Tokenizer]) -> None:
    tokenizer = kinds["sentencepiece"]
    byte = {value: tokenizer._backend.token_to_id(f"<0x{value:02X}>") for value in (0xC3, 0xA9, 0xFF, 0x41)}
    decoder = IncrementalDecoder(tokenizer)
    pieces = [decoder.push([byte[value]]) for value in (0xC3, 0xA9, 0xFF, 0x41)]
    assert pieces == ["", "", "\ufffd" * 3, "\ufffd"], "a run with one bad byte has no character at all"
    assert decoder.push(tokenizer.encode("b", add_special_tokens=False)[-1:]) == "b"


def stop_stream(tokenizer: Tokenizer, stops: list[str], **options: bool) -> TextStream:
    skip = options.pop("skip", True)
    prompt = tokenizer.encode("a", add_special_tokens=False)
    return TextStream(IncrementalDecoder(tokenizer, prompt, skip), stops, **options)


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
@pytest.mark.parametrize(
    ("stop", "before", "through"),
    [
        ("</s>", "ab", "ab"),
        ("b</s>", "a", "ab"),
        ("</s></s>", "ab", "ab"),
        ("</s></s>a", "ab", "aba"),
        ("ab</s></s>ab", "", "abab"),
    ],
)
def test_a_stop_string_with_a_special_token(
    kinds: dict[str, Tokenizer], kind: str, stop: str, before: str, through: str
) -> None:
    tokenizer = kinds[kind]
    text = [tokenizer._backend.token_to_id(letter) for letter in "ab"]
    ids = [*text, 2, 2, *text]
    for keep, expected in ((False, before), (True, through)):
        one_by_one, text_of_all, num_tokens = stop_stream(tokenizer, [stop], keep_stop=keep), "", 0
        for token_id in ids:
            text_of_all += one_by_one.push([token_id])
            num_tokens += 1
            if one_by_one.matched is not None:
                break
        assert (one_by_one.matched, text_of_all) == (stop, expected)
        together = stop_stream(tokenizer, [stop], keep_stop=keep)
        assert (together.push(ids[:num_tokens], final=True), together.matched) == (expected, stop)


def test_text_that_only_looks_like_a_special_stop_is_released(kinds: dict[str, Tokenizer]) -> None:
    tokenizer = kinds["byte_level"]
    a, b = (tokenizer._backend.token_to_id(letter) for letter in "ab")
    stream = stop_stream(tokenizer, ["a</s>b"])
    assert [stream.push([token_id]) for token_id in (a, 2, 2, b, a)] == ["", "", "a", "b", ""]
    assert stream.push([], final=True) == "a"
    assert stream.matched is None


def test_a_plain_stop_string_reaches_over_hidden_tokens(kinds: dict[str, Tokenizer]) -> None:
    tokenizer = kinds["byte_level"]
    a, b = (tokenizer._backend.token_to_id(letter) for letter in "ab")
    stream = stop_stream(tokenizer, ["ab"])
    assert "".join(stream.push([token_id]) for token_id in (b, a, 2, b)) == "b"
    assert stream.matched == "ab", "it would be seen in the answer"


def test_a_stop_in_bytes_matches_with_its_last_byte(kinds: dict[str, Tokenizer]) -> None:
    tokenizer = kinds["sentencepiece"]
    ids = tokenizer.encode("🌱", add_special_tokens=False)[-4:]
    stream = stop_stream(tokenizer, ["🌱"])
    assert [stream.push([token_id]) for token_id in ids] == [""] * 4
    assert stream.matched == "🌱"


def test_a_stop_before_half_a_character_matches_at_once(kinds: dict[str, Tokenizer]) -> None:
    """A token may hold the end of a stop string and the beginning of a character, which may never be completed."""
    tokenizer = kinds["byte_level"]
    tokenizer._backend.add_tokens(["b\u0120\u00f0"])  # b, a space, the first byte of four
    a = tokenizer._backend.token_to_id("a")
    stream = stop_stream(tokenizer, ["ab "])
    assert [stream.push([a]), stream.push([a]), stream.push([tokenizer.vocab_size])] == ["", "a", ""]
    assert stream.matched == "ab "


@pytest.mark.parametrize("text", ["a .b , c ' d n't e 's", "a  ' m n ' t .", " . . '", "don ' t  .", "x n 't 've"])
def test_cleaned_pieces_are_the_cleaned_whole(text: str) -> None:
    for size in (1, 2, 5):
        stage = CleanUp()
        parts = [stage.push(text[place : place + size]) for place in range(0, len(text), size)]
        assert "".join(parts) + stage.push("", final=True) == clean_up(text)


def test_bytes_of_tokens_in_the_middle_of_a_text(kinds: dict[str, Tokenizer]) -> None:
    for kind, token, expected in (
        ("unigram", "▁a", b" a"),
        ("word_piece", "##a", b"a"),
        ("word_piece", "a", b" a"),
        ("sentencepiece", "▁a", b" a"),
        ("sentencepiece", "<0xE6>", b"\xe6"),
        ("sentencepiece", "</s>", b"</s>"),
        ("words_alone", "a", b" a"),
    ):
        tokenizer = kinds[kind]
        assert tokenizer.token_bytes(tokenizer._backend.token_to_id(token)) == expected, (kind, token)
