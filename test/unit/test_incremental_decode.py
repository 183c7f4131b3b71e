"""Text from tokens as they come: the pieces are the whole, no half characters, and no stop string gets out."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ramet.srt.text.incremental_decode import IncrementalDecoder, TextStream, find_stop, held_length
from ramet.srt.text.tokenizer import Tokenizer
from random_models import write_tokenizer
from tokenizers import Tokenizer as BackendTokenizer
from tokenizers import decoders, models, normalizers

TEXTS = st.text(alphabet="aäb植é🌱 .\n", max_size=30)
STOPS = st.lists(st.text(alphabet="aäb植🌱 ", min_size=1, max_size=4), min_size=1, max_size=3)


def byte_level_tokenizer(folder: Path) -> Tokenizer:
    write_tokenizer(folder)
    return Tokenizer.from_path(str(folder))


def sentencepiece_tokenizer() -> Tokenizer:
    """Llama 2's kind: "▁" for spaces, bytes as <0xNN>, and the first space of a text stripped."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for token in [*(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "ab", "."]:
        vocab[token] = len(vocab)
    backend = BackendTokenizer(
        models.BPE(vocab, [("▁", "a"), ("a", "b")], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>"})


@pytest.fixture(scope="module", params=["byte_level", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    if request.param == "sentencepiece":
        return sentencepiece_tokenizer()
    return byte_level_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def pieces(tokenizer: Tokenizer, ids: list[int], prompt: list[int], sizes: list[int]) -> list[str]:
    decoder, parts, place = IncrementalDecoder(tokenizer, prompt), [], 0
    for size in [*sizes, len(ids)]:
        part = ids[place : place + size]
        place += len(part)
        parts.append(decoder.push(part, final=place == len(ids)))
        if place == len(ids):
            break
    return parts


@settings(max_examples=150, deadline=None)
@given(prompt=TEXTS, text=TEXTS, sizes=st.lists(st.integers(1, 4), max_size=80))
def test_pieces_are_the_whole(tokenizer: Tokenizer, prompt: str, text: str, sizes: list[int]) -> None:
    prompt_ids, ids = tokenizer.encode(prompt), tokenizer.encode(text)
    whole = tokenizer.decode(prompt_ids + ids, skip_special_tokens=True)
    expected = whole[len(tokenizer.decode(prompt_ids, skip_special_tokens=True)) :]
    parts = pieces(tokenizer, ids, prompt_ids, sizes)
    assert "".join(parts) == expected
    assert not any("\ufffd" in part for part in parts)


def test_half_characters_wait_and_the_end_shows_them(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🌱")[-4:]
    decoder = IncrementalDecoder(tokenizer)
    assert [decoder.push([token_id]) for token_id in ids[:-1]] == [""] * (len(ids) - 1)
    assert decoder.push([], final=True).startswith("\ufffd")


def test_endless_garbage_is_not_held_for_ever(tokenizer: Tokenizer) -> None:
    decoder = IncrementalDecoder(tokenizer)
    byte = tokenizer.encode("🌱")[-1]
    assert any(decoder.push([byte]) for _ in range(40))


def run_stream(tokenizer: Tokenizer, ids: list[int], stops: list[str], minimum: int = 0, **options: bool) -> tuple:
    """Text and matched stop string of an output that the scheduler would end where a stop string is complete."""
    stream = TextStream(IncrementalDecoder(tokenizer), stops, minimum, **options)
    shown = []
    for place, token_id in enumerate(ids):
        shown.append(stream.push([token_id], final=place == len(ids) - 1))
        if stream.matched is not None:
            break
    return shown, stream.matched


@settings(max_examples=300, deadline=None)
@given(text=TEXTS, stops=STOPS)
def test_no_stop_string_gets_out(tokenizer: Tokenizer, text: str, stops: list[str]) -> None:
    ids = tokenizer.encode(text)
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    shown, matched = run_stream(tokenizer, ids, stops)
    released = "".join(shown)
    assert whole.startswith(released)
    assert not any(stop in released for stop in stops)
    if matched is None:
        assert released == whole
        assert not any(stop in whole for stop in stops)
    else:
        assert whole[len(released) :].startswith(matched)
    for place in range(len(shown)):
        begun = "".join(shown[: place + 1])
        assert not any(whole.startswith(stop, len(begun) - 1) and len(stop) == 1 for stop in stops if begun)


@settings(max_examples=150, deadline=None)
@given(text=TEXTS, stops=STOPS, sizes=st.lists(st.integers(1, 4), max_size=40))
def test_larger_pieces_give_the_same(tokenizer: Tokenizer, text: str, stops: list[str], sizes: list[int]) -> None:
    """The detokenizer gets several tokens at a time where the scheduler has looked at each."""
    ids = tokenizer.encode(text)
    one_by_one = TextStream(IncrementalDecoder(tokenizer), stops)
    expected, end = "", 0
    for end in range(1, len(ids) + 1):
        expected += one_by_one.push(ids[end - 1 : end], final=end == len(ids))
        if one_by_one.matched is not None:
            break
    ids = ids[:end]
    together, released, place = TextStream(IncrementalDecoder(tokenizer), stops), "", 0
    for size in [*sizes, max(1, len(ids))]:
        released += together.push(ids[place : place + size], final=place + size >= len(ids))
        place += size
        if place >= len(ids):
            break
    assert released == expected
    assert together.matched == one_by_one.matched


def test_the_first_tokens_are_free_of_stops(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ab ab ab")
    free = len(tokenizer.encode("ab"))
    shown, matched = run_stream(tokenizer, ids, ["b"], minimum=free)
    assert matched == "b"
    assert "".join(shown).count("b") == 1


def test_stop_string_is_kept_on_request(tokenizer: Tokenizer) -> None:
    shown, matched = run_stream(tokenizer, tokenizer.encode("a.b"), ["."], keep_stop=True)
    assert matched == "."
    assert "".join(shown).strip() == "a."


def test_find_stop_takes_the_first_then_the_longest() -> None:
    assert find_stop("xabc", ["bc", "a", "ab"]) == (1, "ab")
    assert find_stop("xyz", ["a"]) is None


@pytest.mark.parametrize(
    ("text", "stops", "length"),
    [("abc", ["cd"], 1), ("abc", ["bcd", "cx"], 2), ("abc", ["abc"], 0), ("", ["a"], 0), ("aa", ["aab"], 2)],
)
def test_held_length(text: str, stops: list[str], length: int) -> None:
    assert held_length(text, stops) == length
