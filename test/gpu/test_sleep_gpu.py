"""A GPU's memory that is really given back, and comes back with the same bytes under graphs and other processes."""

import os
import sys
from pathlib import Path

import pytest
import random_models as rm
import torch
import toy_model as toy
from ramet.srt.model_loader.arena.allocate import allocate_arena
from ramet.srt.model_loader.arena.cuda import CudaWeightArena
from ramet.srt.model_loader.arena.cuda_memory import PinnedMemory, SegmentMemory
from ramet.srt.model_loader.checksums.entries import compute_checksums
from ramet.srt.model_loader.loader import DummyModelLoader
from ramet.srt.utils.cuda_driver import call_driver
from ramet.srt.utils.cuda_virtual_memory import VirtualMemory, imported
from ramet.srt.utils.device import current_context
from ramet.srt.weights.copy_op import CopyOp
from ramet.srt.weights.memory_messages import StartSource
from ramet.srt.weights.update_messages import DropWeightsReq, FilesSource
from sleeping_engine import Sleeper
from updated_engine import Updated

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmark"))
from bench_common import running  # noqa: E402 - its folder is made importable above

DEVICE = torch.device("cuda", 0)


def free_nbytes() -> int:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(DEVICE)[0]


def test_memory_comes_and_goes_at_one_address() -> None:
    with current_context(DEVICE):
        torch.empty(1, device=DEVICE).fill_(7)  # loads the kernel, which takes memory of its own
        before = free_nbytes()
        memory = VirtualMemory(1 << 30, 0)
        tensor = torch.as_tensor(memory, device=DEVICE)
        assert tensor.data_ptr() == memory.address and before - free_nbytes() >= 1 << 30
        tensor.fill_(7)
        memory.give_back()
        assert before - free_nbytes() < 64 << 20
        memory.take()
        tensor.fill_(3)
        assert int(tensor[-1]) == 3
        other = VirtualMemory(1 << 30, 0)
        torch.as_tensor(other, device=DEVICE).fill_(5)
        memory.give_back()
        memory.take_over(other)
        assert int(tensor[0]) == 5 and not other.is_there
        del tensor, memory, other
        assert before - free_nbytes() < 64 << 20


def test_memory_is_imported_by_its_descriptor() -> None:
    with current_context(DEVICE):
        memory = VirtualMemory(4 << 20, 0)
        tensor = torch.as_tensor(memory, device=DEVICE)
        tensor.copy_(torch.arange(len(tensor), device=DEVICE) % 251)
        fd = memory.export()
        try:
            with imported(fd, memory.nbytes, 0) as address:
                assert address != memory.address
                seen = torch.empty_like(tensor)
                stream = torch.cuda.current_stream(DEVICE)
                call_driver("cuMemcpyDtoDAsync_v2", seen.data_ptr(), address, memory.nbytes, stream.cuda_stream)
                assert torch.equal(seen, tensor)
        finally:
            os.close(fd)


@pytest.fixture
def arena():
    manifest = toy.make_manifest(toy.make_model())
    arena = allocate_arena(manifest, "cuda", can_be_put_away=True)
    DummyModelLoader(3).load_weights(manifest, arena, "")
    return arena


def test_an_arena_is_put_away_with_and_without_a_copy(arena) -> None:
    address, before = arena.address, compute_checksums(arena.manifest, arena).values
    arena.put_away(keeps_copy=True)
    with pytest.raises(RuntimeError, match="given back"):
        arena.hash_entries(arena.manifest.entries)
    assert arena.take_back() and arena.address == address
    assert compute_checksums(arena.manifest, arena).values == before
    stage = arena.open_stage(arena.manifest)
    DummyModelLoader(4).load_weights(arena.manifest, stage, "")
    other = compute_checksums(arena.manifest, stage).values
    arena.exchange(stage)  # by copies
    assert compute_checksums(arena.manifest, arena).values == other
    assert compute_checksums(arena.manifest, stage).values == before
    arena.put_away(keeps_copy=False)
    assert not arena.take_back()
    arena.exchange(stage)  # by mapping
    assert compute_checksums(arena.manifest, arena).values == before and stage.is_put_away


def test_other_weights_wait_in_host_memory(arena) -> None:
    """Filled, hashed and exchanged as if the GPU had them."""
    before = compute_checksums(arena.manifest, arena).values
    for keeps in (arena, allocate_arena(arena.manifest, "cuda")):
        DummyModelLoader(3).load_weights(arena.manifest, keeps, "")
        stage = CudaWeightArena(arena.manifest, "cuda", PinnedMemory)
        stage.spare = torch.empty(stage.nbytes, dtype=torch.uint8, device=DEVICE)
        assert stage.in_host_memory
        DummyModelLoader(4).load_weights(arena.manifest, stage, "")
        other = compute_checksums(arena.manifest, stage).values
        keeps.exchange(stage)
        assert compute_checksums(arena.manifest, keeps).values == other
        assert compute_checksums(arena.manifest, stage).values == before


@pytest.mark.parametrize("kind", [SegmentMemory, PinnedMemory])
def test_another_arena_takes_what_is_lent_by_a_descriptor(arena, kind) -> None:
    other = CudaWeightArena(arena.manifest, "cuda", kind)
    share = arena.share()
    try:
        op = CopyOp(source=0, source_offset=0, target_offset=0, row_nbytes=arena.nbytes)
        other.open_shared(share).copy([op], lambda: True, 5.0)
    finally:
        os.close(share.fd)
    assert torch.equal(other.buffer, arena.buffer)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: rm.make_model(folder / name, "llama3", seed=seed) for seed, name in enumerate(("old", "new"))}


@pytest.mark.parametrize("keeps_copy", [False, True])
def test_captured_graphs_answer_as_before(models, keeps_copy) -> None:
    sleeper = Sleeper(models["old"], device="cuda", enable_memory_saver=True, max_total_tokens=1 << 20)
    expected, kv_nbytes = sleeper.tokens(), sleeper.engine.runner.kv_pool.buffer.nbytes
    for _ in range(3):
        sleeper.pause()
        before = free_nbytes()
        reply = sleeper.release(keeps_copy=keeps_copy)
        assert reply.success and reply.num_bytes >= kv_nbytes
        assert free_nbytes() - before >= 0.95 * reply.num_bytes
        reply = sleeper.resume(sources=[] if keeps_copy else [StartSource()])
        assert reply.success and reply.source == ("host_memory" if keeps_copy else "checkpoint"), reply.message
        sleeper.go_on()
        assert sleeper.tokens() == expected


def test_an_update_takes_the_place_of_what_sleeps(models) -> None:
    sleeper = Sleeper(models["old"], device="cuda", enable_memory_saver=True)
    expected = Updated(models["new"], device="cuda").tokens()
    sleeper.pause()
    sleeper.release()
    assert sleeper.stage(models["new"]).success and sleeper.switch().success
    sleeper.ask(DropWeightsReq(request_id="drop", number=0))
    assert sleeper.resume("kv_cache").success
    sleeper.go_on()
    assert sleeper.tokens() == expected
    sleeper.pause()
    sleeper.release()
    assert sleeper.resume(sources=[FilesSource(path=str(models["new"]))]).success
    sleeper.go_on()
    assert sleeper.tokens() == expected


def test_servers_that_sleep_give_and_take_weights() -> None:
    """One wakes from the other; clones copy memory that is lent by a descriptor."""
    model = ROOT / "examples" / "demo_model"
    flags = ["--device", "cuda", "--max-total-tokens", "8192", "--max-running-requests", "8", "--enable-memory-saver"]
    offer = "--remote-instance-weight-loader-start-seed-via-transfer-engine"
    question = {"text": "What is a ramet?", "sampling_params": {"temperature": 0, "max_new_tokens": 16}}
    with running(model, *flags, offer) as seed:
        expected = seed.call("/generate", question)["text"]
        source = ["--load-format", "remote_instance", "--remote-instance-weight-loader-seed-instance-ip",
                  f"127.0.0.1:{seed.port}", "--remote-instance-weight-loader-fallback", "error"]  # fmt: skip
        with running(model, *flags, *source) as clone:
            assert clone.rank_info()["load_report"]["source"] == "local_copy"
            seed.call("/release_memory_occupation", {})
            assert clone.call("/generate", question)["text"] == expected
            seed.call("/resume_memory_occupation", {"address": f"127.0.0.1:{clone.port}"})
            assert seed.call("/generate", question)["text"] == expected
