"""An arena in a GPU's memory holds what one in host memory holds, whatever fills it."""

import pytest
import random_models as rm
import torch
from ramet.srt.configs.model_config import ModelConfig
from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.model_loader.arena.allocate import allocate_arena
from ramet.srt.model_loader.checksums.entries import compute_checksums
from ramet.srt.model_loader.checksums.entries import with_checksums as add_checksums
from ramet.srt.model_loader.client.band_check import check_bands
from ramet.srt.model_loader.client.verification import expected_checksums, find_mismatches
from ramet.srt.model_loader.loader import DefaultModelLoader, DummyModelLoader
from ramet.srt.models.decoder import DecoderForCausalLM
from ramet.srt.weights.manifest import build_weight_manifest


def make_arena(folder, device, dtype, parallel=None):
    parallel = parallel or ParallelConfig()
    config = ModelConfig.from_path(str(folder))
    model = DecoderForCausalLM(config, getattr(torch, dtype), parallel)
    manifest = build_weight_manifest(
        model.named_parameters(remove_duplicate=False), model_name="m", revision="", dtype=dtype, quantization="",
        role="target", parallel=parallel,
    )  # fmt: skip
    arena = allocate_arena(manifest, device)
    arena.bind(model)
    return arena, manifest, model


@pytest.mark.parametrize("tp_rank", [None, 1])
def test_the_content_of_gpu_memory_is_compared_with_the_digest(tmp_path, tp_rank):
    folder = rm.make_model(tmp_path, "llama3")
    parallel = None if tp_rank is None else ParallelConfig(tp_size=2, tp_rank=tp_rank)
    arena, manifest, _ = make_arena(folder, "cuda", "float32", parallel)
    DefaultModelLoader(weights_digest="files").load_weights(manifest, arena, str(folder))
    check = check_bands(arena, arena.content_digest)
    assert (check.wrong, check.unchecked) == (set(), {})
    for entry in manifest.entries:
        arena.buffer[entry.offset] ^= 1
        assert check_bands(arena, arena.content_digest).wrong == {entry.name}
        arena.buffer[entry.offset] ^= 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])  # as stored, and converted on the way
@pytest.mark.parametrize("tp_rank", [None, 1])
def test_files_give_the_same_bytes_on_both_devices(tmp_path, dtype, tp_rank):
    folder = rm.make_model(tmp_path, "llama3", max_shard_size="100KB")
    parallel = None if tp_rank is None else ParallelConfig(tp_size=2, tp_rank=tp_rank)
    tensors = {}
    for device in ("cpu", "cuda"):
        arena, manifest, model = make_arena(folder, device, dtype, parallel)
        if device == "cuda":
            arena.buffer.fill_(255)  # what is not written must be cleared
        DefaultModelLoader().load_weights(manifest, arena, str(folder))
        tensors[device] = {name: value.cpu() for name, value in model.named_parameters()}
        start = manifest.entries[1].offset
        assert (
            arena.gather([(start, start + 8)])
            == tensors[device][manifest.entries[1].name].flatten().view(torch.uint8)[:8].numpy().tobytes()
        )
    assert all(torch.equal(value, tensors["cuda"][name]) for name, value in tensors["cpu"].items())


def test_dummy_weights_are_the_same_on_both_devices(tmp_path):
    folder = rm.make_model(tmp_path, "llama2")
    models = {}
    for device in ("cpu", "cuda"):
        arena, manifest, models[device] = make_arena(folder, device, "bfloat16")
        DummyModelLoader(3).load_weights(manifest, arena, "")
    pairs = zip(models["cpu"].parameters(), models["cuda"].parameters(), strict=True)
    assert all(torch.equal(a, b.cpu()) for a, b in pairs)


def test_checksums_find_the_tensor_that_differs(tmp_path):
    folder = rm.make_model(tmp_path, "llama2")
    arena, manifest, _ = make_arena(folder, "cuda", "float32")
    DummyModelLoader(0).load_weights(manifest, arena, "")
    seed = add_checksums(manifest, compute_checksums(manifest, arena))
    expected = expected_checksums(arena, seed)
    assert find_mismatches(manifest, arena, expected) == []
    changed = manifest.entries[3]
    arena.buffer[changed.offset + changed.nbytes - 1] ^= 1
    assert find_mismatches(manifest, arena, expected) == [changed.name]


def test_too_little_memory_is_one_clear_line(tmp_path):
    folder = rm.make_model(tmp_path, "llama2")
    free, _ = torch.cuda.mem_get_info()
    filler = torch.empty(free - (4 << 20) - (free % (2 << 20)), dtype=torch.uint8, device="cuda")
    try:
        _, manifest, _ = None, make_arena(folder, "cpu", "float32")[1], None
        import msgspec

        large = msgspec.structs.replace(manifest, arena_nbytes=1 << 30)
        with pytest.raises(MemoryError, match=r"need 1\.07 GB, but of the .* GB of GPU 0 only .* GB are free"):
            allocate_arena(large, "cuda")
    finally:
        del filler
        torch.cuda.empty_cache()
