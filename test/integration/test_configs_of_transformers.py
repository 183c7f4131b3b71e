"""Owns the tests that Ramet reads configs as transformers' classes do, or refuses them by the key's name."""

import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import config_reference as cr
import pytest
import random_models as rm
from engine_harness import EngineHarness

pytestmark = pytest.mark.slow

PROMPTS = rm.random_prompts([5, 40, 150])
NUM_TOKENS = 6
# Where Ramet takes what transformers' class doesn't: null as the default in two keys, and a Llama or a Gemma that says
# how wide a head is and whose hidden size is no multiple of its heads.
TOLERATED = {
    "qwen3_moe": {("norm_topk_prob", "null"), ("decoder_sparse_step", "null")},
    "gemma2": {("hidden_size", "1"), ("hidden_size", "7"), ("query_pre_attn_scalar", "2.5")},
    "gemma3": {("hidden_size", "1"), ("hidden_size", "7"), ("query_pre_attn_scalar", "2.5")},
    "llama3": {("hidden_size", "1"), ("hidden_size", "7")},
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]


def keys_of_families() -> dict[str, list[Any]]:
    values: dict[str, list[Any]] = defaultdict(list)
    for family in (*rm.FAMILIES.values(), *({key: value} for key, all_ in cr.FOREIGN_KEYS.items() for value in all_)):
        for key, value in family.items():
            if value not in values[key]:
                values[key].append(value)
    return values


# llama3 is llama2's class, and glm_moe_dsa has all keys of deepseek_v32.
MUTATED = sorted(rm.FAMILIES.keys() - {"llama2", "deepseek_v32"})
# Ramet reads each change. Transformers, which makes a model of it, reads one in so many: in each family others.
SHARE = 1 if os.environ.get("RAMET_CONFIGS") == "all" else 4


@pytest.mark.parametrize("family", MUTATED)
def test_each_change_of_a_config_is_read_as_transformers_does_or_refused_by_name(family):
    config = rm._COMMON | rm.FAMILIES[family] | {"torch_dtype": "float32"}
    assert cr.compare(config) is None
    wrong = []
    for number, (key, changed) in enumerate(cr.mutations(config, keys_of_families()), start=MUTATED.index(family)):
        ask = cr.refusal if number % SHARE else cr.compare
        value = json.dumps(changed[key])[:60] if key in changed else "missing"
        try:
            message = ask(changed)
        except cr.Disagreement as error:
            if (key, value) not in TOLERATED.get(family, ()):
                wrong.append(f"{key} {value}: {error}")
            continue
        if message is not None and key.removesuffix("s") not in message and not names_another(key, message):
            wrong.append(f"{key} {value}: refused without its name: {message}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("family", sorted(rm.FAMILIES))
def test_all_that_transformers_itself_writes_is_read(tmp_path, family):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(rm.make_config(tmp_path, family))
    assert cr.compare(config.to_dict()) is None  # every key of the class
    config.save_pretrained(tmp_path)
    assert cr.compare(json.loads((tmp_path / "config.json").read_text())) is None


def names_another(key: str, message: str) -> bool:
    """Whether what is wrong shows in another key, which then doesn't fit."""
    others = {  # and how many columns of a head rotate shows in LongRoPE's list of factors
        **dict.fromkeys(("hidden_size", "num_attention_heads", "head_dim"), ("short_factor", "partial_rotary_factor")),
        "partial_rotary_factor": ("short_factor",),
        "num_hidden_layers": ("mlp_only_layers", "layer_types", "no_rope_layers"),
        "n_routed_experts": ("n_group",),
        "n_group": ("topk_group",),
    }
    return any(name in message for name in others.get(key, ()))


def edited(folder: Path, change: dict[str, Any], without: tuple[str, ...] = ()) -> Path:
    file = folder / "config.json"
    config = {key: value for key, value in json.loads(file.read_text()).items() if key not in without} | change
    file.write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("family", "made_with", "change", "without"),
    [
        # Both spellings of rope at once: the older one counts.
        ("qwen3", {}, {"rope_scaling": {"type": "linear", "factor": 4.0}}, ()),
        ("llama3", {}, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 5000.0}, ()),
        ("qwen3", {}, {"rope_scaling": YARN}, ()),
        ("qwen2", {}, {"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": 8, "truncate": False}}, ()),
        ("mistral", {}, {"rope_scaling": YARN | {"mscale": 2.0, "mscale_all_dim": 0.5, "rope_theta": 5000.0}}, ()),
        # Windows that the family's class doesn't use, or uses whatever the switch of another family says.
        ("qwen2", {}, {"sliding_window": 12}, ("use_sliding_window",)),
        ("qwen3", {}, {"sliding_window": 12}, ("use_sliding_window",)),
        ("qwen3_moe", {}, {"sliding_window": 12}, ("use_sliding_window",)),
        ("llama2", {}, {"sliding_window": 12}, ()),
        ("llama2", {}, {"sliding_window": 12, "layer_types": SLIDING}, ()),
        ("mixtral", {}, {"layer_types": SLIDING}, ()),
        ("mistral", {}, {"layer_types": SLIDING}, ()),
        ("mistral", {}, {"use_sliding_window": False}, ()),
        ("mistral", {}, {"sliding_window": None}, ()),
        ("qwen2", {}, {"sliding_window": 12, "use_sliding_window": True}, ("max_window_layers",)),
        ("qwen2", {}, {"sliding_window": 12, "use_sliding_window": True, "max_window_layers": 1}, ()),
        ("qwen3_moe", {}, {"sliding_window": 12, "use_sliding_window": True, "max_window_layers": 1}, ()),
        # Missing keys: the family's defaults.
        ("mixtral", {}, {}, ("rope_parameters", "rms_norm_eps", "max_position_embeddings")),
        ("mistral", {}, {}, ("rope_parameters", "sliding_window", "rms_norm_eps", "max_position_embeddings")),
        ("qwen3", {"head_dim": 128}, {}, ("head_dim", "rope_parameters")),
        ("qwen3_moe", {"head_dim": 16}, {}, ("head_dim", "norm_topk_prob", "hidden_act", "tie_word_embeddings")),
        ("llama2", {}, {}, ("num_key_value_heads", "attention_bias", "mlp_bias", "rms_norm_eps")),
        # The length before the scaling: beside the scaling, inside, nowhere.
        ("llama3", {}, {"original_max_position_embeddings": 16}, ()),
        ("llama3", {}, {"rope_parameters": {**LLAMA3, "rope_theta": 500000.0}}, ()),
        # Biases.
        ("llama2", {"attention_bias": True, "mlp_bias": True}, {}, ()),
        ("qwen3", {"attention_bias": True}, {}, ()),
        ("qwen2", {}, {"attention_bias": False}, ()),
    ],
)
def test_tokens_and_logprobs_of_such_configs(tmp_path, family, made_with, change, without):
    folder = edited(rm.make_model(tmp_path, family, **made_with), change, without)
    engine = EngineHarness(folder)
    results = engine.generate(PROMPTS, max_new_tokens=NUM_TOKENS, logprob_start_len=0)
    assert [result.token_ids for result in results] == rm.hf_greedy(folder, PROMPTS, NUM_TOKENS)
    for prompt, result, expected in zip(PROMPTS, results, rm.hf_logprobs(folder, PROMPTS), strict=True):
        wanted = [expected[place, token].item() for place, token in enumerate(prompt[1:])]
        assert result.input_logprobs.logprobs[1:] == pytest.approx(wanted, abs=1e-4)
