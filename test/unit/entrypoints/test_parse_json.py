"""Bodies are parsed as the standard library parses them."""

import json
import math

import pytest
from ramet.srt.entrypoints.http.direct_routes import parse_json

DOCUMENTS = [
    b"18446744073709551616", b"9" * 400, b"9" * 5000, b"1e400", b"1.0", b"1E2", b"-0", b"-0.0", b"1e-400", b"4.9e-324",
    b"9007199254740993.0", b"123456789012345678901234567890.5", b"NaN", b"-Infinity", b"01", b"1.", b"1 2", b" 1 \n",
    b'"\\ud800"', b'"\\ud83d\\ude00"', b'"\x01"', b'"\x7f"', b'"a\tb"', b'"\xed\xa0\x80"', b'"\xff"', b"\xef\xbb\xbf1",
    '{"a": "ä"}'.encode("utf-16"), b'{"a": 1, "a": [2]}', b"[1,]", b"{1: 2}", b"tru", b"null", b"", b"\xc2\xa01",
    b"[" * 100_000, b'{"prompt": [1, 2, 3], "stop": ["\\u00e4", "\\""], "temperature": 0.1}',
]  # fmt: skip


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: repr(document[:30]))
def test_as_the_standard_library_does_it(document: bytes) -> None:
    try:
        expected = json.loads(document)
    except (ValueError, RecursionError) as error:
        with pytest.raises(type(error)):
            parse_json(document)
        return
    parsed = parse_json(document)
    if isinstance(expected, float) and math.isnan(expected):
        assert math.isnan(parsed)
    else:
        assert (type(parsed), parsed, str(parsed)) == (type(expected), expected, str(expected))
