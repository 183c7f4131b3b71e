"""Owns the tests of taking a mixture-of-experts model from seeds of other tensor- and expert-parallel sizes."""

import pytest
import random_models as rm
import sharded_models as sm
import toy_model as toy
from ramet.srt.weights.manifest import WeightManifest, layout_digest
from ramet.srt.weights.planner import ArenaSource, PlanError, plan, zero_ranges

FAMILIES = {"qwen3_moe": {"num_experts": 8, "dtype": "bfloat16"}, "mixtral": {"dtype": "float32"}}
PAIRS = [  # (tp_size, ep_size) of the seed and of the client
    ((2, 2), (1, 1)),
    ((1, 1), (2, 2)),
    ((2, 1), (4, 2)),
    ((4, 2), (2, 1)),
    ((2, 1), (2, 2)),
    ((4, 4), (4, 2)),
    ((4, 1), (1, 1)),
    ((4, 2), (4, 2)),
]


@pytest.fixture(scope="module", params=FAMILIES)
def model_folder(request, tmp_path_factory):
    """Config and weights, in the type that the family's case names."""
    folder = rm.make_config(tmp_path_factory.mktemp(request.param), request.param, **FAMILIES[request.param])
    whole = sm.build_model(folder, sm.all_ranks(1)[0])
    tensors = sm.random_checkpoint(sm.checkpoint_shapes([whole]))
    toy.save_checkpoint(folder, {name: tensor.to(whole.dtype) for name, tensor in tensors.items()}, num_files=2)
    return folder


def make_manifests(folder, topology) -> list[WeightManifest]:
    return [sm.make_manifest(sm.build_model(folder, parallel)) for parallel in sm.all_ranks(*topology)]


@pytest.mark.parametrize(("seed", "client"), PAIRS, ids=lambda topology: sm.topology_name(topology))
def test_a_client_of_another_topology_gets_the_bytes_of_a_load_from_disk(model_folder, seed, client):
    seed_manifests = make_manifests(model_folder, seed)
    seeds = [sm.load_from_disk(model_folder, manifest).memory for manifest in seed_manifests]
    sources = [ArenaSource(f"rank {rank}", manifest) for rank, manifest in enumerate(seed_manifests)]
    for manifest in make_manifests(model_folder, client):
        result = plan(manifest, sources)
        memory = bytearray(b"\xee" * manifest.arena_nbytes)
        for start, stop in zero_ranges(manifest):
            memory[start:stop] = bytes(stop - start)
        sm.execute(result.ops, seeds, memoryview(memory))
        assert memory == sm.load_from_disk(model_folder, manifest).memory[: manifest.arena_nbytes]


def test_whole_experts_move_in_one_piece(model_folder):
    """From ep 1 to ep 2 a rank's stack of experts is one range of the seed's stack."""
    (seed,) = make_manifests(model_folder, (1, 1))
    for client in make_manifests(model_folder, (2, 2)):
        ops = plan(client, [ArenaSource("seed", seed)]).ops
        for entry in client.entries:
            if entry.name.endswith(("w13_weight", "w2_weight")):
                stop = entry.offset + entry.nbytes
                touching = [op for op in ops if op.target_offset < stop and op.target_stop > entry.offset]
                assert len(touching) == 1 and touching[0].is_contiguous


def test_experts_that_no_seed_has_are_named(model_folder):
    (client,) = make_manifests(model_folder, (1, 1))
    first_half = make_manifests(model_folder, (2, 2))[0]
    with pytest.raises(PlanError) as caught:
        plan(client, [ArenaSource("rank 0", first_half)])
    missing = [part for part in caught.value.uncovered if "w13_weight" in part]
    assert missing and not any("experts.0." in part for part in missing)


def test_layouts_of_other_expert_parallel_ranks_differ(model_folder):
    digests = [layout_digest(m) for topology in ((2, 1), (2, 2)) for m in make_manifests(model_folder, topology)]
    assert len(set(digests)) == 4
