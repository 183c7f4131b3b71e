"""What another host says of its weights is read, or refused with ValueError: nothing else stops who asks for them."""

import json
from typing import Any

import pytest
from ramet.srt.weights import registration
from ramet.srt.weights.registration import parse_answer, parse_registration

DEEP = "[" * 30_000 + "]" * 30_000
BOX = ["a", [[0, 2], [0, 2]], [[0, 2], [0, 2]]]
ENTRY = {"name": "a", "dtype": "float32", "shape": [2, 2], "offset": 0, "nbytes": 16, "boxes": [BOX]}
EMPTY = {"name": "b", "dtype": "float32", "shape": [0, 1 << 64], "offset": 16, "nbytes": 0, "boxes": []}
FAR_BOX = ["a", [[1 << 64, (1 << 64) + 1], [0, 2]], [[0, 1], [0, 2]]]


def answer(entries: list[Any], **parallel: int) -> dict[str, Any]:
    manifest = {
        "model_name": "m",
        "revision": "",
        "dtype": "float32",
        "quantization": "",
        "role": "target",
        "parallel": parallel,
        "arena_nbytes": 256,
        "entries": entries,
    }
    info = ["h:1", {"a": [4096, 4, 4]}]
    return {"rank": 0, "remote_instance_transfer_engine_info": info, "manifest": manifest, "arena_address": 4096}


def test_a_sound_answer_is_read() -> None:
    assert parse_answer(json.dumps(answer([ENTRY], tp_size=2)).encode()).manifest is not None


@pytest.mark.parametrize(
    "hostile",
    [
        answer([ENTRY, EMPTY]),
        answer([ENTRY | {"boxes": [FAR_BOX]}]),
        answer([ENTRY], tp_size=1 << 40),
        answer([ENTRY], tp_size=1 << 10, pp_size=1 << 10),
        answer([ENTRY], attn_dp_size=0),
        answer([ENTRY], attn_dp_size=-1),
    ],
)
def test_numbers_of_no_instance_are_refused(hostile: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        parse_answer(json.dumps(hostile).encode())


@pytest.mark.parametrize("parse", [parse_answer, parse_registration])
def test_what_is_nested_too_deeply_is_refused(parse: Any) -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        parse(f'{{"x": {DEEP}}}'.encode())


def test_what_is_seen_at_a_glance_is_refused_before_the_rest_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="rank 5 is none of this instance's 2 ranks"):
        parse_registration(b'{"transfer_engine_info": 1, "rank": 5}', 2)
    monkeypatch.setattr(registration, "MAX_REGISTRATION_VALUES", 10)
    with pytest.raises(ValueError, match="at most 10 values"):
        parse_registration(b'{"rank": 0, "x": [1,1,1,1,1,1,1,1,1,1,1]}')
