"""The checksum kernel against the formula in its docstring, in plain Python."""

import contextlib
import random
from types import SimpleNamespace

import pytest
import torch

MASK = (1 << 64) - 1


def mix(state):
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
    return state ^ (state >> 31)


def mix64(data):
    words = [int.from_bytes(data[start : start + 8], "little") for start in range(0, len(data), 8)]
    return sum(mix(word ^ mix(index + 1)) for index, word in enumerate(words)) & MASK


@pytest.mark.parametrize("nbytes", [0, 1, 8, 13, 4096 * 8, 4096 * 8 * 2 + 5])
def test_mix64(device, nbytes):
    from ramet.srt.model_loader.arena import cuda_hash

    data = random.Random(nbytes).randbytes(nbytes)
    padded = bytearray(data + b"\xff" * (-nbytes % 8 + 16))  # what lies behind must not count
    words = torch.frombuffer(padded, dtype=torch.int64).to(device)
    out = torch.zeros((), dtype=torch.int64, device=device)
    cuda_hash.mix64(words, nbytes, out)
    assert int(out) & MASK == mix64(data)


def test_rows_that_lie_apart_hash_like_their_copy(device):
    from ramet.srt.model_loader.arena import cuda_hash

    data = random.Random(0).randbytes(400)
    buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
    copy = b"".join(data[start : start + 6] for first in (3, 210) for start in range(first, first + 5 * 20, 20))
    assert cuda_hash.gather_and_hash(buffer, [3, 210], 6, 5, 20) == f"{mix64(copy):016x}"


def test_an_arena_hashes_entries_and_rows_on_its_own_stream(device, monkeypatch):
    from ramet.srt.model_loader.arena.cuda import CudaWeightArena

    data = random.Random(1).randbytes(400)
    arena = object.__new__(CudaWeightArena)
    buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
    arena.is_put_away, arena._memory = False, SimpleNamespace(buffer=buffer)
    if device.type == "cuda":
        arena.torch_device, arena.stream = buffer.device, torch.cuda.Stream()
        arena.stream.wait_stream(torch.cuda.current_stream())
    else:
        used = []
        arena.torch_device, arena.stream = "the GPU", "its stream"
        for name in ("device", "stream"):
            monkeypatch.setattr(torch.cuda, name, lambda what: used.append(what) or contextlib.nullcontext())
    entries = [SimpleNamespace(offset=256, nbytes=13), SimpleNamespace(offset=0, nbytes=100)]
    expected = tuple(f"{mix64(data[e.offset : e.offset + e.nbytes]):016x}" for e in entries)
    assert arena.hash_entries(entries) == arena.hash_samples(entries) == expected
    rows = b"".join(data[start : start + 6] for start in range(3, 103, 20))
    assert arena.hash_rows([3], 6, 5, 20) == f"{mix64(rows):016x}"
    assert device.type == "cuda" or used == 3 * ["the GPU", "its stream"]
