"""Owns the tests of vLLM's parameters filled from an instance's weights, as vLLM's own loading was once recorded.

test/manual/record_vllm_layouts.py has written the records, with a real vLLM.
"""

import json
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import random_models as rm
import sharded_models as sm
import torch
import toy_model as toy
from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.model_loader.arena.host import HostWeightArena
from ramet.srt.weights.agreement import find_disagreement
from ramet.srt.weights.manifest import WeightBox, WeightManifest, layout_digest
from ramet.srt.weights.planner import ArenaSource, plan
from ramet_vllm.model_layout import ModelFacts, ModelTensor, lay_out, shared_dimensions
from ramet_vllm.seed_tensors import collect_tensors
from ramet_vllm.watched_load import CannotMap, Placed

RECORDS = json.loads((Path(__file__).parent / "vllm_layouts.json").read_text())
CASES = {
    f"{one['family']}-tp{one['tp_size']}-rank{one['rank']}" + ("-ep" if one["has_expert_parallel"] else ""): one
    for one in RECORDS["cases"]
}
SEED_SIZES = {"qwen3": [(1, 1), (2, 1)], "qwen3_moe": [(1, 1), (2, 1), (2, 2)], "llama3": [(1, 1), (4, 1)]}
FACTS = ModelFacts(
    model_name="random", revision="", dtype="bfloat16", weight_version="default", dimensions={}, is_tied=False,
    has_all_experts=True,
)  # fmt: skip


class Seed:
    """An instance's ranks, each with its weights in memory, and the whole tensors that they were made from."""

    def __init__(self, folder: Path, family: str, tp_size: int, ep_size: int):
        rm.make_config(folder, family, **RECORDS["models"][family])
        whole = sm.build_model(folder, ParallelConfig())
        shapes = sm.checkpoint_shapes([whole])
        self.tensors = {name: one.bfloat16() for name, one in sm.random_checkpoint(shapes).items()}
        toy.save_checkpoint(folder, self.tensors)
        self.manifests = [sm.make_manifest(sm.build_model(folder, rank)) for rank in sm.all_ranks(tp_size, ep_size)]
        self.memories = [sm.load_from_disk(folder, manifest).memory for manifest in self.manifests]

    def give(self, manifest: WeightManifest) -> HostWeightArena:
        """An arena that the planner has filled from the ranks."""
        arena = HostWeightArena(manifest)
        sources = [ArenaSource(f"rank {rank}", one) for rank, one in enumerate(self.manifests)]
        sm.execute(plan(manifest, sources).ops, self.memories, arena.memory)
        return arena


def recorded(case: dict) -> tuple[list[ModelTensor], Placed]:
    tensors = [ModelTensor(name, dtype, tuple(shape)) for name, (dtype, shape) in case["tensors"].items()]
    boxes = {name: msgspec.convert(given, list[WeightBox]) for name, given in case["boxes"].items()}
    zeros = msgspec.convert(case["zeros"], dict[str, list[tuple[tuple[int, int], ...]]])
    return tensors, Placed(boxes, zeros)


def lay_out_case(case: dict, seed: Seed, **changes) -> WeightManifest:
    tensors, placed = recorded(case)
    facts = replace(FACTS, has_all_experts=not case["has_expert_parallel"], **changes)
    parallel = ParallelConfig(tp_size=case["tp_size"], tp_rank=case["rank"])
    return lay_out(tensors, placed, collect_tensors(seed.manifests), facts, parallel)


def expected(case: dict, name: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """What vLLM holds under a name, by the rules of its layers."""
    size, rank = case["tp_size"], case["rank"]
    model = RECORDS["models"][case["family"]]

    def rows(part: str, count: int = size, index: int = rank) -> torch.Tensor:
        return tensors[name.replace(fused, part)].chunk(count, 0)[index]

    if name.endswith("qkv_proj.weight"):
        fused, heads = "qkv_proj", model["num_key_value_heads"]
        shares = min(size, heads)
        return torch.cat(
            [rows("q_proj"), *(rows(part, shares, rank * shares // size) for part in ("k_proj", "v_proj"))]
        )
    if name.endswith("gate_up_proj.weight"):
        fused = "gate_up_proj"
        return torch.cat([rows("gate_proj"), rows("up_proj")])
    if ".experts." in name:
        layer = name.split(".experts.")[0]
        experts = range(model["num_experts"])
        if case["has_expert_parallel"]:
            experts, size, rank = list(experts)[rank * 2 : rank * 2 + 2], 1, 0

        def share(expert: int, part: str, dim: int) -> torch.Tensor:
            return tensors[f"{layer}.experts.{expert}.{part}.weight"].chunk(size, dim)[rank]

        if name.endswith("w2_weight"):
            return torch.stack([share(expert, "down_proj", 1) for expert in experts])
        gate_up = [[share(expert, part, 0) for part in ("gate_proj", "up_proj")] for expert in experts]
        return torch.stack([torch.cat(pair) for pair in gate_up])
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        return tensors[name].chunk(size, 1)[rank]
    if name in ("model.embed_tokens.weight", "lm_head.weight"):
        padded = torch.zeros(384, tensors[name].shape[1], dtype=torch.bfloat16)
        padded[:331] = tensors[name]
        return padded.chunk(size, 0)[rank]
    return tensors[name]


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    made: dict[tuple, Seed] = {}

    def get(family: str, tp_size: int = 1, ep_size: int = 1) -> Seed:
        key = family, tp_size, ep_size
        if key not in made:
            made[key] = Seed(tmp_path_factory.mktemp(family), *key)
        return made[key]

    return get


@pytest.mark.parametrize("name", CASES)
def test_each_rank_of_vllm_holds_what_its_layers_need(name, seeds):
    """From seeds of several sizes: fused rows, replicated heads, padded vocabularies, split and whole experts."""
    case = CASES[name]
    for tp_size, ep_size in SEED_SIZES[case["family"]]:
        seed = seeds(case["family"], tp_size, ep_size)
        manifest = lay_out_case(case, seed)
        assert {entry.name for entry in manifest.entries} == set(case["tensors"])
        arena = seed.give(manifest)
        for entry in manifest.entries:
            assert torch.equal(arena.tensor(entry), expected(case, entry.name, seed.tensors)), entry.name


def test_equal_layouts_move_in_one_piece(seeds):
    """vLLM's parameters of a dense model are laid out as the seed's: one range, or a mapping, is all it takes."""
    seed = seeds("llama3")
    manifest = lay_out_case(CASES["llama3-tp1-rank0"], seed)
    names = [entry.name for entry in seed.manifests[0].entries]
    assert [entry.name for entry in manifest.entries] == names
    ops = plan(manifest, [ArenaSource("seed", seed.manifests[0])]).ops
    assert len(ops) <= 2


def test_a_rank_takes_its_own_part_alone(seeds):
    seed = seeds("qwen3")
    whole, half = (lay_out_case(CASES[f"qwen3-tp{size}-rank0"], seed) for size in (1, 2))
    plans = [plan(one, [ArenaSource("seed", seed.manifests[0])]).nbytes for one in (whole, half)]
    assert plans[1] < 0.6 * plans[0]


def test_another_model_is_refused_by_its_sizes(seeds):
    """Whose tensors are larger, so that all that is needed lies inside of them."""
    seed = seeds("qwen3")
    said = seed.manifests[0].dimensions
    config = type("Config", (), {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": "many"})
    dimensions = shared_dimensions(said, config)
    assert dimensions == {"hidden_size": 32, "num_hidden_layers": 1}
    manifest = lay_out_case(CASES["qwen3-tp1-rank0"], seed, dimensions=dimensions)
    assert find_disagreement(manifest, seed.manifests[0]) == f"its hidden_size is {said['hidden_size']}, not 32"


def test_a_part_that_nothing_fills_is_refused(seeds):
    seed, case = seeds("qwen3"), CASES["qwen3-tp1-rank0"]
    tensors, placed = recorded(case)
    checkpoint = collect_tensors(seed.manifests)
    qkv = "model.layers.0.self_attn.qkv_proj.weight"
    without_v = {**placed.boxes, qkv: placed.boxes[qkv][:2]}
    del checkpoint["model.layers.0.self_attn.v_proj.weight"]
    with pytest.raises(CannotMap, match=f"only a part is filled of {qkv}"):
        lay_out(tensors, Placed(without_v, placed.zeros), checkpoint, FACTS, ParallelConfig())
    without_qkv = {name: boxes for name, boxes in placed.boxes.items() if name != qkv}
    for part in "qk":
        del checkpoint[f"model.layers.0.self_attn.{part}_proj.weight"]
    with pytest.raises(CannotMap, match=f"no tensor of the seed fills {qkv}"):
        lay_out(tensors, Placed(without_qkv, placed.zeros), checkpoint, FACTS, ParallelConfig())


def test_padding_that_is_not_cleared_is_refused(seeds):
    tensors, placed = recorded(CASES["qwen3-tp1-rank0"])
    with pytest.raises(CannotMap, match="only a part is filled of model.embed_tokens.weight"):
        lay_out(tensors, Placed(placed.boxes, {}), collect_tensors(seeds("qwen3").manifests), FACTS, ParallelConfig())


def test_a_head_that_the_model_leaves_out_is_refused(seeds):
    """As where config.json ties the head to the embedding, and the seed's files hold another one."""
    tensors, placed = recorded(CASES["qwen3-tp1-rank0"])
    tied = [one for one in tensors if one.name != "lm_head.weight"]
    boxes = {name: given for name, given in placed.boxes.items() if name != "lm_head.weight"}
    with pytest.raises(CannotMap, match="leaves out tensors that the seed has: lm_head.weight"):
        lay_out(tied, Placed(boxes, placed.zeros), collect_tensors(seeds("qwen3").manifests), FACTS, ParallelConfig())


def test_two_tensors_in_one_place_are_refused(seeds):
    tensors, placed = recorded(CASES["qwen3-tp1-rank0"])
    norm = "model.norm.weight"
    twice = [*placed.boxes[norm], msgspec.structs.replace(placed.boxes[norm][0], checkpoint_name="lm_head.weight")]
    with pytest.raises(CannotMap, match="fill the same part of model.norm.weight"):
        lay_out(tensors, Placed({**placed.boxes, norm: twice}, placed.zeros),
                collect_tensors(seeds("qwen3").manifests), FACTS, ParallelConfig())  # fmt: skip


def test_ranks_differ_in_what_they_hold(seeds):
    manifests = [lay_out_case(CASES[f"qwen3-tp2-rank{rank}"], seeds("qwen3")) for rank in (0, 1)]
    assert layout_digest(manifests[0]) != layout_digest(manifests[1])
