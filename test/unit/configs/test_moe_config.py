"""Owns the tests of reading what a config says of its experts."""

import pytest
import random_models as rm
from ramet.srt.configs.model_config import ModelConfig
from ramet.srt.configs.parallel_config import ParallelConfig, check_parallel_sizes


def read(folder, family, **overrides) -> ModelConfig:
    return ModelConfig.from_path(str(rm.make_config(folder, family, **overrides)))


def test_qwen3_moe(tmp_path):
    moe = read(tmp_path, "qwen3_moe").moe
    assert (moe.num_experts, moe.num_experts_per_tok, moe.intermediate_size) == (6, 3, 40)
    assert moe.norm_topk_prob and moe.sparse_layers == (True, False, True)


@pytest.mark.parametrize(
    ("overrides", "sparse_layers"),
    [
        ({"mlp_only_layers": []}, (True, True, True)),
        ({"mlp_only_layers": None, "decoder_sparse_step": None}, (True, True, True)),
        ({"mlp_only_layers": [], "decoder_sparse_step": 2}, (False, True, False)),
        ({"mlp_only_layers": [0, 2]}, (False, True, False)),
        ({"mlp_only_layers": [1], "decoder_sparse_step": 2}, (False, False, False)),
    ],
)
def test_which_layers_have_experts(tmp_path, overrides, sparse_layers):
    assert read(tmp_path, "qwen3_moe", **overrides).moe.sparse_layers == sparse_layers


def test_transformers_5_writes_qwens_number_under_mixtrals_name(tmp_path):
    folder = rm.make_config(tmp_path, "qwen3_moe", num_local_experts=8)
    file = folder / "config.json"
    file.write_text(file.read_text().replace('"num_experts": 6,', ""))
    assert ModelConfig.from_path(str(folder)).moe.num_experts == 8


def test_norm_topk_prob_is_off_unless_it_is_said(tmp_path):
    for value in (False, None):
        assert not read(tmp_path, "qwen3_moe", norm_topk_prob=value).moe.norm_topk_prob


def test_mixtral(tmp_path):
    config = read(tmp_path, "mixtral")
    assert (config.moe.num_experts, config.moe.num_experts_per_tok, config.moe.intermediate_size) == (4, 2, 72)
    assert config.moe.norm_topk_prob and all(config.moe.sparse_layers)
    assert [layer.window for layer in config.layers] == [12, 12, 12]


def test_dense_models_have_none(tmp_path):
    assert read(tmp_path, "qwen3").moe is None


@pytest.mark.parametrize(
    ("family", "overrides", "message"),
    [
        ("qwen3_moe", {"num_experts": 0}, "'num_experts' must be a positive integer; got 0"),
        ("qwen3_moe", {"moe_intermediate_size": None}, "'moe_intermediate_size' must be a positive integer; got None"),
        ("qwen3_moe", {"num_experts_per_tok": "8"}, "'num_experts_per_tok' must be a positive integer; got '8'"),
        ("qwen3_moe", {"num_experts_per_tok": 7}, r"'num_experts_per_tok' \(7\) is more than 'num_experts' \(6\)"),
        ("qwen3_moe", {"norm_topk_prob": 1}, "'norm_topk_prob' must be true or false; got 1"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "'decoder_sparse_step' must be a positive integer; got 0"),
        ("qwen3_moe", {"mlp_only_layers": [3]}, r"'mlp_only_layers' must list layers in \[0, 3\); got \[3\]"),
        ("qwen3_moe", {"mlp_only_layers": 1}, "'mlp_only_layers' must list layers"),
        ("mixtral", {"num_local_experts": None}, "'num_local_experts' must be a positive integer; got None"),
    ],
)
def test_a_wrong_field_is_named(tmp_path, family, overrides, message):
    with pytest.raises(ValueError, match=f"config.json: {message}"):
        read(tmp_path, family, **overrides)


def test_splits(tmp_path):
    moe = read(tmp_path, "qwen3_moe").moe
    for tp_size, ep_size in ((1, 1), (2, 2), (4, 2), (6, 6), (3, 3), (8, 1)):
        moe.check_split(tp_size, ep_size)
    for tp_size, ep_size in ((4, 4), (3, 1), (4, 3), (32, 2)):
        with pytest.raises(ValueError, match="--ep-size .* does not divide"):
            moe.check_split(tp_size, ep_size)


def test_a_split_is_checked_before_anything_starts(tmp_path):
    qwen, mixtral, dense = (read(tmp_path / name, name) for name in ("qwen3_moe", "mixtral", "qwen3"))
    check_parallel_sizes(qwen, tp_size=2, pp_size=3, ep_size=2)
    check_parallel_sizes(mixtral, tp_size=4, pp_size=1, ep_size=4)
    with pytest.raises(ValueError, match="--ep-size 4 does not divide the model's 6 experts"):
        check_parallel_sizes(qwen, tp_size=4, pp_size=1, ep_size=4)
    with pytest.raises(ValueError, match="--ep-size 2 is for models with experts; Qwen3ForCausalLM has none"):
        check_parallel_sizes(dense, tp_size=2, pp_size=1, ep_size=2)


def test_only_plain_mlps_need_the_intermediate_size_divided(tmp_path):
    sizes = {"intermediate_size": 98, "moe_intermediate_size": 40}
    check_parallel_sizes(read(tmp_path, "qwen3_moe", mlp_only_layers=[], **sizes), tp_size=4, pp_size=1, ep_size=1)
    with pytest.raises(ValueError, match="--tp-size 4 does not divide the intermediate size 98"):
        check_parallel_sizes(read(tmp_path, "qwen3_moe", **sizes), tp_size=4, pp_size=1, ep_size=1)


def test_expert_parallel_ranks_of_a_world():
    ranks = [ParallelConfig.of_rank(rank, tp_size=4, dp_size=2, ep_size=2) for rank in range(8)]
    assert [(rank.dp_rank, rank.tp_rank, rank.ep_rank, rank.moe_tp_rank) for rank in ranks] == [
        (dp, tp, tp // 2, tp % 2) for dp in range(2) for tp in range(4)
    ]
