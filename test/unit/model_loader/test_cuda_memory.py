"""The kinds of memory of a GPU's arena, with stand-ins for the driver and torch's GPU: test/gpu has the real ones."""

import contextlib
import gc

import pytest
import torch
from ramet.srt.model_loader.arena import cuda_pinned
from ramet.srt.model_loader.arena.cuda_memory import PinnedMemory
from ramet.srt.utils.device import take_all_free

GPU = torch.device("cuda", 1)


@pytest.fixture
def pinned(monkeypatch):
    """Addresses of what is pinned; None in it: the driver refuses more."""
    pinned = []

    def call_driver(name, address, *more):
        if name == "cuMemHostUnregister":
            pinned.remove(address)
        elif None in pinned:
            raise OSError("cuMemHostRegister_v2: out of memory")
        else:
            assert name == "cuMemHostRegister_v2" and more == (4096, 3)
            pinned.append(address)

    def current_context(device):
        assert device == GPU
        return contextlib.nullcontext()

    monkeypatch.setattr(cuda_pinned, "call_driver", call_driver)
    monkeypatch.setattr(cuda_pinned, "current_context", current_context)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: current_context(device))
    monkeypatch.setattr(torch, "as_tensor", lambda seen, device: [seen])  # as torch's keeps it
    return pinned


def test_pinned_memory_stays_as_long_as_anything_sees_it(pinned):
    memory = PinnedMemory(4096, GPU)
    seen = memory.buffer
    interface = seen[0].__cuda_array_interface__
    assert interface["data"] == (memory.host.data_ptr(), False) and interface["shape"] == (4096,)
    del memory
    gc.collect()
    assert pinned == [interface["data"][0]]
    del seen
    gc.collect()
    assert not pinned


def test_what_torch_has_kept_is_given_back_where_it_is_needed(monkeypatch):
    free, calls = [1], []

    def take():
        if not free:
            raise MemoryError
        return free.pop()

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty") or free.append(2))
    assert take_all_free(take) == 1 and not calls
    assert take_all_free(take) == 2 and calls == ["empty"]
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    with pytest.raises(MemoryError):
        take_all_free(take)


def test_what_is_not_pinned_is_too_much_and_nothing_else(pinned):
    pinned.append(None)
    with pytest.raises(MemoryError, match="does not pin"):
        PinnedMemory(4096, GPU)
    gc.collect()
    assert pinned == [None]
