"""JSON that comes in pieces: a value ends where it ends, breaks where it breaks, and is what Python's reader says."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ramet.srt.text.json_text import JsonText

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


def read(text: str, size: int = 1) -> tuple[str, JsonText]:
    """What is read of a text in pieces of a size, and the reader."""
    reader, pieces = JsonText(), []
    for start in range(0, len(text), size):
        end, piece = reader.take(text[: start + size], start)
        pieces.append(piece)
        if reader.is_done or reader.is_bad:
            break
        assert end == min(start + size, len(text))
    return "".join(pieces), reader


@settings(deadline=None)
@given(VALUES, st.booleans(), st.sampled_from([None, 1]), st.integers(1, 9))
def test_every_value_is_read_to_its_end(value: object, ensure_ascii: bool, indent: int | None, size: int) -> None:
    text = json.dumps([value], ensure_ascii=ensure_ascii, indent=indent)
    written, reader = read(text + "]x", size)
    assert reader.is_done
    assert json.loads(written) == [value]
    assert written == text


@settings(max_examples=2000, deadline=None)
@given(st.text(alphabet='{}[]",:\\ntfu0123456789.eE+-ra lse\n', max_size=12), st.data())
def test_it_takes_what_pythons_reader_takes(inner: str, data: st.DataObject) -> None:
    text = f"[{inner}]"
    written, reader = read(text, data.draw(st.integers(1, 4)))
    try:
        value, end = json.JSONDecoder(strict=False).raw_decode(text)
    except ValueError:
        assert not reader.is_done
        return
    assert reader.is_done
    assert json.loads(written) == value
    assert len(json.dumps(value)) >= 2 and end >= 2


@pytest.mark.parametrize(
    ("text", "before"),
    [("[01]", "[01"), ("[1.]", "[1."), ("[1,]", "[1,"), ('{"a"}', '{"a"'), ('["\\x"]', '["\\'), ("[tru]", "[tru"),
     ('["\\u12g"]', '["\\u12'), ("[NaN]", "["), ("{a: 1}", "{"), ("]", ""), ("[1}", "[1")],
)  # fmt: skip
def test_it_breaks_before_what_cannot_come(text: str, before: str) -> None:
    assert read(text)[0] == before
    assert read(text)[1].is_bad
    assert read(text, 20)[0] == before


def test_line_breaks_in_strings_become_escapes() -> None:
    written, reader = read('{"a": "x\ny\t"}')
    assert reader.is_done
    assert written == '{"a": "x\\ny\\t"}'


def test_depth_is_no_matter() -> None:
    written, reader = read("[" * 100_000 + "]" * 100_000, 1000)
    assert reader.is_done
    assert len(written) == 200_000
