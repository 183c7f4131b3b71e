"""gpt-oss's files: stacks of experts, turned round or in MXFP4, as ranks hold them, clone them and compare them."""

import fp8_models as fp8
import packed_models as pm
import pytest
import random_models as rm
import sharded_models as sm
import torch
from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.model_loader.checkpoint.digest_store import compute_table
from ramet.srt.model_loader.client.band_check import check_bands
from ramet.srt.weights.planner import ArenaSource, plan
from safetensors.torch import load_file
from updated_engine import Updated

STACKS = ("gate_up_proj", "down_proj")
SQUARE = {"intermediate_size": 64}  # as the hidden size: no shape tells how the matrices lie
TOPOLOGIES = ((1, 1), (2, 1), (2, 2), (4, 2))


def make(folder, **options):
    return rm.make_model(folder, "gpt_oss", dtype="bfloat16", num_attention_heads=8, num_local_experts=4, **options)


@pytest.fixture(scope="module", params=[{}, SQUARE], ids=["", "square"])
def source(request, tmp_path_factory):
    return make(tmp_path_factory.mktemp("gpt_oss"), **request.param)


@pytest.fixture(scope="module")
def mxfp4(source):
    return pm.write_gpt_oss(source, source / "mxfp4")


def test_ranks_hold_their_experts_as_blocks_or_turned_round(source, mxfp4):
    """Every rank's part of an expert ends within a block of 32 columns."""
    for folder in (source, mxfp4[0]):
        content = load_file((mxfp4[1] if folder == mxfp4[0] else source) / "model.safetensors")
        for parallel in (one for sizes in TOPOLOGIES for one in sm.all_ranks(*sizes)):
            held = fp8.effective(fp8.load_model(folder, parallel))
            size, experts = content["model.layers.0.mlp.experts.down_proj"].shape[1], slice(None)
            if parallel.ep_size > 1:
                experts = slice(2 * parallel.ep_rank, 2 * parallel.ep_rank + 2)
            part = size // parallel.moe_tp_size
            start, stop = parallel.moe_tp_rank * part, (parallel.moe_tp_rank + 1) * part
            for layer in range(3):
                up, down = (content[f"model.layers.{layer}.mlp.experts.{name}"][experts].float() for name in STACKS)
                path = f"model.layers.{layer}.mlp.experts"
                assert torch.equal(held[f"{path}.w13_weight"], up[:, :, 2 * start : 2 * stop].transpose(1, 2))
                assert torch.equal(held[f"{path}.w2_weight"], down[:, start:stop].transpose(1, 2))


def test_mxfp4_answers_as_transformers_over_the_plain_weights(mxfp4):
    fp8.check_answers(*mxfp4)


def test_clones_of_another_topology_hold_the_same_bytes_and_are_compared_with_the_digest(source, mxfp4, monkeypatch):
    """From tp 2 to tp 1, from tp 1 to ep 2, from ep 2 to tp 2; a changed byte of anything is noticed."""
    monkeypatch.setenv("RAMET_DIGEST_DIR", str(source / "digests"))
    for folder in (source, mxfp4[0]):
        table = compute_table(str(folder))
        arenas = {
            sizes: [fp8.load_arena(folder, sm.build_model(folder, parallel)) for parallel in sm.all_ranks(*sizes)]
            for sizes in TOPOLOGIES
        }
        for seed, client in (((2, 1), (1, 1)), ((1, 1), (2, 2)), ((2, 2), (2, 1)), ((4, 2), (1, 1))):
            sources = [ArenaSource(f"rank {rank}", arena.manifest) for rank, arena in enumerate(arenas[seed])]
            for expected in arenas[client]:
                memory = bytearray(expected.manifest.arena_nbytes)
                sm.execute(
                    plan(expected.manifest, sources).ops, [one.memory for one in arenas[seed]], memoryview(memory)
                )
                assert memory == expected.memory[: len(memory)]
        for arena in (*arenas[2, 1], *arenas[2, 2]):
            check = check_bands(arena, table)
            assert (check.wrong, check.unchecked) == (set(), {})
        arena = arenas[2, 1][1]
        entries = [entry for entry in arena.manifest.entries if "layers.0" in entry.name]
        for entry in entries:
            arena.memory[entry.offset + entry.nbytes - 1] ^= 1
        assert check_bands(arena, table).wrong == {entry.name for entry in entries}


def test_tensors_that_a_trainer_sends_are_turned_round(source, tmp_path):
    """Under the names of its own state dict, stacks as the files have them."""
    updated = Updated(source)
    new = make(tmp_path / "new", seed=5, intermediate_size=updated.engine.runner.model_config.intermediate_size)
    assert updated.put(new / "model.safetensors").success and updated.seal().success and updated.switch().success
    assert updated.checksums() == Updated(new).checksums()


def test_a_rank_that_would_cut_a_byte_is_refused(tmp_path):
    folder = rm.make_config(tmp_path, "gpt_oss", intermediate_size=30)
    fp8.change_config(folder, quantization_config=pm.GPT_OSS)
    with pytest.raises(ValueError, match="would cut a word of 2 packed numbers"):
        sm.build_model(folder, ParallelConfig(tp_size=2))
