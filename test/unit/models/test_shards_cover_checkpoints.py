"""Owns the test that the ranks of every topology together hold each element of the checkpoint as often as needed."""

import pytest
import random_models as rm
import sharded_models as sm
import torch
from ramet.srt.configs.model_config import ModelConfig

# Changes that let every topology divide the model. Some have fewer key/value heads than ranks.
CASES = {
    "qwen2": {"num_attention_heads": 8, "hidden_size": 64},
    "qwen3_moe": {"num_experts": 8},
    "qwen2_moe": {"num_key_value_heads": 4},
    "seed_oss": {"num_attention_heads": 8},
    "gpt_oss": {"num_attention_heads": 8, "num_local_experts": 8},
    "deepseek_v3": {"num_attention_heads": 8, "num_key_value_heads": 8},
    "deepseek_v32": {"num_attention_heads": 8, "num_key_value_heads": 8},
}


def count_coverage(models: list[torch.nn.Module]) -> dict[str, torch.Tensor]:
    """For every element of every checkpoint tensor, in how many boxes of all parameters it is."""
    shapes = sm.checkpoint_shapes(models)
    counts = {name: torch.zeros(shape, dtype=torch.int32) for name, shape in shapes.items()}
    for model in models:
        for parameter in model.parameters():
            for box in parameter.boxes:
                counts[box.checkpoint_name][tuple(slice(a, b) for a, b in box.source)] += 1
    return counts


def expected_copies(name: str, tp_size: int, config: ModelConfig, ep_size: int = 1) -> int:
    """How many ranks hold a checkpoint tensor: sharded ones are on one each."""
    if config.traits.qk_norm == "all" and "q_norm" in name:
        return 1
    if "k_proj" in name or "v_proj" in name or (config.traits.qk_norm == "all" and "k_norm" in name):
        return max(1, tp_size // config.num_key_value_heads)
    if name.endswith("experts.down_proj_bias"):
        return tp_size // ep_size
    if any(part in name for part in ("q_a_proj", "kv_a_proj_with_mqa", ".indexer.")):  # of which all heads need all
        return tp_size
    replicated = (
        "norm.weight",
        "gate.weight",
        "router.weight",
        "router.bias",
        "correction_bias",
        "o_proj.bias",
        "down_proj.bias",
    )
    if name.endswith(replicated):
        return tp_size
    return 1


@pytest.mark.parametrize("topology", sm.TOPOLOGIES, ids=sm.topology_name)
@pytest.mark.parametrize("family", rm.FAMILIES)
def test_every_element_is_held(tmp_path, family, topology):
    tp_size, ep_size = topology
    folder = rm.make_config(tmp_path, family, **CASES.get(family, {}))
    ranks = [sm.build_model(folder, parallel) for parallel in sm.all_ranks(tp_size, ep_size)]
    whole = sm.build_model(folder, sm.all_ranks(1)[0])
    assert sm.checkpoint_shapes(ranks) == sm.checkpoint_shapes([whole])
    for name, count in count_coverage(ranks).items():
        assert torch.all(count == expected_copies(name, tp_size, whole.config, ep_size)), name
    for model in ranks:
        for name, count in count_coverage([model]).items():
            assert count.max() <= 1, name


@pytest.mark.parametrize("topology", sm.TOPOLOGIES, ids=sm.topology_name)
@pytest.mark.parametrize("family", rm.FAMILIES)
def test_every_parameter_is_filled_once(tmp_path, family, topology):
    folder = rm.make_config(tmp_path, family, **CASES.get(family, {}))
    for parallel in sm.all_ranks(*topology):
        model = sm.build_model(folder, parallel)
        sm.make_manifest(model)  # checks that boxes fit shapes
        for name, parameter in model.named_parameters():
            count = torch.zeros(parameter.shape, dtype=torch.int32)
            for box in parameter.boxes:
                count[tuple(slice(a, b) for a, b in box.target)] += 1
            assert count.max() <= 1, name
            is_vocabulary = name in ("model.embed_tokens.weight", "lm_head.weight")
            assert is_vocabulary or count.all(), name  # the vocabulary's last rows are padding


def test_biases_of_row_parallel_layers_are_on_every_rank(tmp_path):
    folder = rm.make_config(tmp_path, "llama2", attention_bias=True, mlp_bias=True)
    ranks = [sm.build_model(folder, parallel) for parallel in sm.all_ranks(2)]
    for name, count in count_coverage(ranks).items():
        assert torch.all(count == expected_copies(name, 2, ranks[0].config)), name


def test_moe_parameters_have_upstreams_names_and_shapes(tmp_path):
    qwen = sm.build_model(rm.make_config(tmp_path / "qwen", "qwen3_moe"), sm.all_ranks(4, 2)[3])
    shapes = {name: tuple(parameter.shape) for name, parameter in qwen.named_parameters()}
    assert shapes["model.layers.0.mlp.gate.weight"] == (6, 64)
    assert shapes["model.layers.0.mlp.experts.w13_weight"] == (3, 40, 64)
    assert shapes["model.layers.0.mlp.experts.w2_weight"] == (3, 64, 20)
    assert shapes["model.layers.1.mlp.gate_up_proj.weight"] == (56, 64)
    mixtral = sm.build_model(rm.make_config(tmp_path / "mixtral", "mixtral"), sm.all_ranks(4, 2)[3])
    shapes = {name: tuple(parameter.shape) for name, parameter in mixtral.named_parameters()}
    assert shapes["model.layers.2.block_sparse_moe.gate.weight"] == (4, 64)
    assert shapes["model.layers.2.block_sparse_moe.experts.w13_weight"] == (2, 72, 64)
    assert shapes["model.layers.2.block_sparse_moe.experts.w2_weight"] == (2, 64, 36)
