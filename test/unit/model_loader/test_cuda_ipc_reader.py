"""Reading another process's GPU memory: what happens when a copy is long, or fails. With stand-ins for the GPU."""

import contextlib
import time
from types import SimpleNamespace

import pytest
import torch
from ramet.srt.configs.load_config import LoadConfig
from ramet.srt.model_loader.arena import cuda_ipc
from ramet.srt.model_loader.arena.base import LentMemory
from ramet.srt.model_loader.arena.cuda_ipc import CudaIpcMemory
from ramet.srt.model_loader.client import local


@pytest.fixture
def gpu(monkeypatch):
    """`is_done` answers for the copy; `calls` are those to close things."""
    gpu = SimpleNamespace(is_done=lambda: True, calls=[])
    stream = SimpleNamespace(cuda_stream=0, synchronize=lambda: gpu.calls.append("synchronize"))
    event = SimpleNamespace(record=lambda stream: None, query=lambda: gpu.is_done(), elapsed_time=lambda other: 2500.0)
    monkeypatch.setattr(cuda_ipc, "current_context", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_, **options: stream)
    monkeypatch.setattr(torch.cuda, "Event", lambda **options: event)
    driver = cuda_ipc.cuda_driver
    monkeypatch.setattr(driver, "open_memory", lambda handle: 1)
    monkeypatch.setattr(driver, "close_memory", lambda address: gpu.calls.append("close"))
    monkeypatch.setattr(cuda_ipc.cuda_copies, "queue_copies", lambda *_: None)
    return gpu


def open_memory(share):
    return CudaIpcMemory(share, target=0, device=torch.device("cpu"))


def fill(gpu, seed_is_alive=lambda: True, timeout_s=10.0):
    return open_memory(LentMemory(b"handle", 0)).copy([], seed_is_alive, timeout_s)


def test_the_memory_is_closed_after_the_last_copy(gpu):
    assert fill(gpu) == 2.5 and gpu.calls == ["synchronize", "close"]


def test_the_memory_is_closed_without_a_stream(gpu, monkeypatch):
    def fail(*_, **options):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(torch.cuda, "Stream", fail)
    with pytest.raises(RuntimeError):
        fill(gpu)
    assert gpu.calls == ["close"]


def test_a_seed_that_ends_is_noticed_before_the_copy_is_done_or_its_time_over(gpu):
    gpu.is_done = lambda: False
    alive = iter([True, True, False])
    start = time.monotonic()
    with pytest.raises(OSError, match="the seed ended"):
        fill(gpu, lambda: next(alive))
    assert time.monotonic() - start < 5 and gpu.calls == ["synchronize", "close"]


def test_a_seed_that_ended_with_the_copy_is_noticed(gpu):
    with pytest.raises(OSError, match="the seed ended"):
        fill(gpu, lambda: False)


def test_a_copy_has_a_time_limit(gpu):
    gpu.is_done = lambda: False
    with pytest.raises(TimeoutError, match="0.05 s"):
        fill(gpu, timeout_s=0.05)
    assert gpu.calls == ["synchronize", "close"]


@pytest.fixture
def offered(gpu, monkeypatch):
    """A rank of a seed on this host that lends a GPU's memory; `limits` are the time limits for handing it over."""
    gpu.limits = []
    manifest = SimpleNamespace(parallel=SimpleNamespace(world_rank=0))
    gpu.arena = SimpleNamespace(manifest=manifest, open_shared=open_memory)
    memory = SimpleNamespace(share=LentMemory(b"handle", 0), seed_is_alive=lambda: True)
    memory.__exit__ = lambda: gpu.calls.append("hang up")
    monkeypatch.setattr(local, "request_memory", lambda name, digest, timeout_s: gpu.limits.append(timeout_s) or memory)
    monkeypatch.setattr(local, "layout_digest", lambda manifest: "")
    answer = SimpleNamespace(manifest=SimpleNamespace(), local_handle=SimpleNamespace(socket_name=""))
    return SimpleNamespace(is_local=True, seed="a seed", answer=answer)


def test_a_copy_may_take_longer_than_handing_the_memory_over(gpu, offered, monkeypatch):
    monkeypatch.setattr(CudaIpcMemory, "copy", lambda *arguments: gpu.limits.append(arguments[-1]) or 1.0)
    source = local.open_local(offered, gpu.arena, LoadConfig(timeout_s=60.0), for_copy=True)
    source.run([])
    assert gpu.limits == [local.HAND_OVER_TIMEOUT_S, 60.0]


def test_memory_that_may_not_be_opened_leaves_the_network_to_try(gpu, offered, monkeypatch, caplog):
    def refuse(handle):
        raise OSError("cuIpcOpenMemHandle_v2: invalid device context (CUDA error 201)")

    monkeypatch.setattr(cuda_ipc.cuda_driver, "open_memory", refuse)
    assert local.open_local(offered, gpu.arena, LoadConfig(timeout_s=60.0), for_copy=True) is None
    assert "invalid device context (CUDA error 201)); using the network" in caplog.text
    assert gpu.calls == ["hang up"]


def test_memory_that_was_opened_and_not_copied_is_closed(gpu, offered):
    source = local.open_local(offered, gpu.arena, LoadConfig(timeout_s=60.0), for_copy=True)
    source.close()
    assert gpu.calls == ["close", "hang up"]
