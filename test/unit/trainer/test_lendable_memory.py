"""Memory that a trainer publishes can be had by other processes, whatever torch is set to allocate."""

from types import SimpleNamespace

import pytest
import torch
from ramet.srt.model_loader.arena import allocate
from seed_process import DEFAULTS, make_manifest


class SegmentArena:
    """As one of torch's memory."""

    def __init__(self, refusal: str) -> None:
        self._refusal = refusal

    def share(self) -> object:
        if self._refusal:
            raise OSError(self._refusal)
        return SimpleNamespace()


def allocated(monkeypatch: pytest.MonkeyPatch, refusal: str) -> list[bool]:
    """Whether each of the arenas that were made is of the driver's own memory."""
    made = []

    def make(_manifest: object, _device: object, *, can_be_put_away: bool = False) -> SegmentArena:
        made.append(can_be_put_away)
        return SegmentArena("" if can_be_put_away else refusal)

    monkeypatch.setattr(allocate, "allocate_arena", make)
    allocate.allocate_lendable(make_manifest(DEFAULTS), "cuda")
    return made


def test_memory_that_can_not_be_lent_is_taken_from_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    assert allocated(monkeypatch, "") == [False]
    assert allocated(monkeypatch, "CUDA_ERROR_INVALID_VALUE") == [False, True]


def test_too_little_memory_in_one_piece_is_a_memory_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(_manifest: object, _device: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(allocate, "allocate_arena", make)
    with pytest.raises(MemoryError, match=r"2\.00 GiB\.$"):
        allocate.allocate_lendable(make_manifest(DEFAULTS), "cuda")


def test_a_host_has_the_memory_that_it_always_has() -> None:
    arena = allocate.allocate_lendable(make_manifest(DEFAULTS), "cpu")
    assert arena.device == "cpu" and not arena.in_host_memory
