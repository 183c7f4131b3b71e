"""Owns the tests of reading a config.json: each family's defaults, what null means, and what is refused by name."""

import json
import math

import pytest
import random_models as rm
from ramet.srt.configs.composed_families import ComposedFamily
from ramet.srt.configs.model_config import ModelConfig
from ramet.srt.configs.model_families import FAMILIES
from ramet.srt.configs.model_family import HIDDEN_ACTS
from ramet.srt.layers import activation

SIZES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 8}
NAMES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
SLIDING = ["sliding_attention", "full_attention"] * 2
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.fixture
def read(tmp_path):
    def read_config(family: str, *, without: tuple[str, ...] = (), flag: str = "auto", **keys) -> ModelConfig:
        """A config of the sizes and `keys` alone: everything else is the family's default."""
        config = {"model_type": family, "architectures": [NAMES[family]]} | SIZES | keys
        config = {key: value for key, value in config.items() if key not in without}
        (tmp_path / "config.json").write_text(json.dumps(config))
        return ModelConfig.from_path(str(tmp_path), dtype=flag)

    return read_config


def test_what_families_say_holds_together():
    assert set(HIDDEN_ACTS) == set(activation._ACTIVATIONS)
    composed = [family for family in FAMILIES.values() if isinstance(family, ComposedFamily)]
    texts = [text for family in composed for text in family.texts.values()]
    for family in (*(one for one in FAMILIES.values() if one not in composed), *texts):
        assert set(family.null_means) <= set(family.defaults)


@pytest.mark.parametrize(
    ("model_type", "kv_heads", "head_dim", "theta", "eps", "length", "windows"),
    [
        ("llama", 8, 8, 1e4, 1e-6, 2048, [None] * 4),
        ("mistral", 8, 8, 1e4, 1e-6, 131072, [4096] * 4),
        ("mixtral", 8, 8, 1e6, 1e-5, 131072, [None] * 4),
        ("qwen2", 8, 8, 1e4, 1e-6, 32768, [None] * 4),
        ("qwen3", 8, 128, 1e4, 1e-6, 32768, [None] * 4),
        ("qwen3_moe", 4, 8, 1e4, 1e-6, 32768, [None] * 4),
    ],
)
def test_a_missing_key_has_the_familys_default(read, model_type, kv_heads, head_dim, theta, eps, length, windows):
    # Qwen2's and Qwen3's 32 key/value heads don't fit eight query heads.
    given = {"num_key_value_heads": 8} if model_type in ("qwen2", "qwen3") else {}
    config = read(model_type, **given)
    assert (config.num_key_value_heads, config.head_dim) == (kv_heads, head_dim)
    assert (config.rope.theta, config.rope.rope_type, config.traits.rms_norm_eps) == (theta, "default", eps)
    assert (config.context_len, [layer.window for layer in config.layers]) == (length, windows)
    assert (config.traits.hidden_act, config.tie_word_embeddings, config.dtype) == ("silu", False, "float32")
    assert (config.traits.qkv_bias, config.traits.o_bias, config.traits.mlp_bias) == (
        model_type == "qwen2",
        False,
        False,
    )


def test_sizes_and_experts_have_defaults_too(read):
    config = read("mixtral", without=tuple(SIZES))
    assert config.dimensions == {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "num_experts": 8,
        "moe_intermediate_size": 14336,
    }  # fmt: skip
    assert config.moe.num_experts_per_tok == 2
    moe = read("qwen3_moe", without=tuple(SIZES)).moe
    assert (moe.num_experts, moe.num_experts_per_tok, moe.intermediate_size) == (128, 8, 768)
    assert not moe.norm_topk_prob and moe.sparse_layers == (True,) * 24


@pytest.mark.parametrize(
    ("model_type", "keys", "windows"),
    [
        ("llama", {"sliding_window": 12, "use_sliding_window": True}, [None] * 4),
        ("llama", {"layer_types": ["sliding_attention"] * 4, "sliding_window": 12}, [None] * 4),
        ("mistral", {"sliding_window": None}, [None] * 4),
        ("mistral", {"sliding_window": 12, "use_sliding_window": False}, [12] * 4),
        ("mistral", {"sliding_window": 12, "max_window_layers": 2}, [12] * 4),
        ("mistral", {"sliding_window": 12, "layer_types": None}, [12] * 4),
        ("mistral", {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"] * 2}, [12, None] * 2),
        ("mixtral", {"sliding_window": 12}, [12] * 4),
        ("mixtral", {"sliding_window": 12, "layer_types": ["full_attention"] * 4}, [12] * 4),
        ("qwen2", {"sliding_window": 12}, [None] * 4),
        ("qwen2", {"sliding_window": 12, "use_sliding_window": False, "max_window_layers": 0}, [None] * 4),
        ("qwen2", {"sliding_window": 12, "use_sliding_window": True}, [None] * 4),  # 28 layers come before it
        ("qwen2", {"sliding_window": 12, "use_sliding_window": True, "max_window_layers": 3}, [None] * 3 + [12]),
        ("qwen2", {"sliding_window": None, "use_sliding_window": True, "max_window_layers": 0}, [None] * 4),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 0}, [4096] * 4),
        ("qwen3", {"sliding_window": 12}, [None] * 4),
        ("qwen3", {"sliding_window": 12, "use_sliding_window": True, "layer_types": ["attention"] * 4}, [None] * 4),
        (
            "qwen3",
            {"sliding_window": 12, "use_sliding_window": True, "layer_types": ["attention", "sliding_attention"] * 2},
            [None, 12] * 2,
        ),
        ("qwen3_moe", {"sliding_window": 12}, [None] * 4),
        ("qwen3_moe", {"sliding_window": 12, "use_sliding_window": True, "max_window_layers": 3}, [12] * 4),
        (
            "qwen3_moe",
            {"sliding_window": 12, "use_sliding_window": True, "layer_types": ["full_attention"] * 4},
            [12] * 4,
        ),
    ],
)
def test_windows_are_those_that_the_familys_class_uses(read, model_type, keys, windows):
    assert [layer.window for layer in read(model_type, num_key_value_heads=4, **keys).layers] == windows


@pytest.mark.parametrize(
    ("model_type", "keys", "idle"),
    [
        ("llama", {"sliding_window": None, "use_sliding_window": False, "layer_types": ["full_attention"] * 4}, ()),
        ("llama", {"sliding_window": 12, "layer_types": SLIDING}, ("sliding_window", "layer_types")),
        ("mistral", {"sliding_window": 12, "layer_types": SLIDING}, ()),
        ("mistral", {"use_sliding_window": True, "max_window_layers": 0}, ()),
        ("mistral", {"use_sliding_window": False, "max_window_layers": 2}, ("use_sliding_window", "max_window_layers")),
        ("mixtral", {"sliding_window": 12, "layer_types": SLIDING}, ("layer_types",)),
        ("mixtral", {"sliding_window": None, "use_sliding_window": False}, ()),
        ("qwen2", {"sliding_window": 12, "use_sliding_window": False, "max_window_layers": 2}, ()),
        ("qwen3_moe", {"sliding_window": 12, "max_window_layers": 2}, ()),
        ("qwen3_moe", {"use_sliding_window": True, "max_window_layers": 2}, ("max_window_layers",)),
    ],
)
def test_keys_that_ask_for_windows_in_vain_are_known(read, model_type, keys, idle):
    """The server says in its log that they have no effect."""
    assert read(model_type, num_key_value_heads=4, **keys).idle_window_keys == idle


@pytest.mark.parametrize(
    ("keys", "theta", "scaling"),
    [
        ({"rope_theta": 5}, 5.0, {}),
        ({"rope_parameters": {"rope_theta": 7.0}, "rope_theta": None}, 7.0, {}),
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 5.0}, 5.0, {}),
        ({"rope_parameters": {"rope_type": "default"}}, 1e4, {}),
        ({"rope_parameters": None, "rope_scaling": {}}, 1e4, {}),
        ({"rope_scaling": {"type": "default"}, "original_max_position_embeddings": 9}, 1e4, {}),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, 1e4, {"factor": 2.0}),
        ({"rope_scaling": {"rope_type": "linear", "type": "yarn", "factor": 2}}, 1e4, {"factor": 2.0}),
        # The older key goes before the newer one, whose theta goes with it.
        (
            {
                "rope_parameters": {"rope_type": "default", "rope_theta": 7.0},
                "rope_scaling": {"type": "linear", "factor": 4.0},
            },
            1e4,
            {"factor": 4.0},
        ),
        (
            {
                "rope_parameters": {"rope_theta": 7.0},
                "rope_scaling": {"type": "linear", "factor": 4.0},
                "rope_theta": 5.0,
            },
            5.0,
            {"factor": 4.0},
        ),
    ],
)
def test_rope_spellings(read, keys, theta, scaling):
    rope = read("llama", **keys).rope
    assert (rope.theta, rope.scaling) == (theta, scaling)


@pytest.mark.parametrize(
    ("inside", "beside", "original"),
    [
        ({"original_max_position_embeddings": 32}, {}, 32),
        ({"original_max_position_embeddings": 32}, {"original_max_position_embeddings": 16}, 16),
        ({}, {"original_max_position_embeddings": 16}, 16),
        ({}, {}, 512),
    ],
)
def test_the_length_before_llama3_scaling(read, inside, beside, original):
    config = read("llama", rope_scaling=LLAMA3 | inside, max_position_embeddings=512, **beside)
    assert config.rope.scaling["original_max_position_embeddings"] == original
    assert config.context_len == 512


def test_linear_scaling_stretches_the_context_unless_the_length_before_it_is_there(read):
    linear = {"type": "linear", "factor": 2.5}
    assert read("llama", rope_scaling=linear, max_position_embeddings=100).context_len == 250
    before = {"original_max_position_embeddings": 40}
    assert read("llama", rope_scaling=linear | before, max_position_embeddings=100).context_len == 100
    assert read("llama", rope_scaling=linear, max_position_embeddings=100, **before).context_len == 100


@pytest.mark.parametrize(
    ("options", "attention_factor"),
    [
        ({}, 0.1 * math.log(4) + 1),
        ({"factor": 0.5}, 1.0),
        ({"finetuned": True, "attn_factor": 1.0}, 0.1 * math.log(4) + 1),
        ({"attention_factor": 0.7, "mscale": 2.0, "mscale_all_dim": 1.0}, 0.7),
        ({"mscale": 2.0}, 0.1 * math.log(4) + 1),
        ({"mscale": 2.0, "mscale_all_dim": 1.0}, (0.2 * math.log(4) + 1) / (0.1 * math.log(4) + 1)),
    ],
)
def test_yarn(read, options, attention_factor):
    rope = read("qwen3", num_key_value_heads=8, rope_scaling=YARN | options).rope
    assert rope.attention_factor == pytest.approx(attention_factor, abs=1e-12)
    assert {name: rope.scaling[name] for name in ("beta_fast", "beta_slow", "truncate")} == {
        "beta_fast": 32, "beta_slow": 1, "truncate": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "attention_factor"),
    [
        ({}, math.sqrt(1 + math.log(4) / math.log(64))),
        ({"factor": 2}, math.sqrt(1 + math.log(2) / math.log(64))),
        ({"factor": 0.5}, 1.0),
        ({"factor": 2, "attention_factor": 0.7}, 0.7),
    ],
)
def test_longrope(read, options, attention_factor):
    factors = {"short_factor": [1] * 4, "long_factor": [1, 2, 3, 4]}
    for inside, beside in (
        ({"original_max_position_embeddings": 64}, {}),
        ({}, {"original_max_position_embeddings": 64}),
    ):
        scaling = {"type": "longrope"} | factors | inside | options
        config = read("llama", max_position_embeddings=256, rope_scaling=scaling, **beside)
        assert (config.rope.switch_len, config.context_len) == (64, 256)
        assert config.rope.attention_factor == pytest.approx(attention_factor, abs=1e-12)
        assert config.rope.scaling["long_factor"] == [1, 2, 3, 4]


def test_a_theta_that_is_gone_is_known(read):
    both = {"rope_scaling": YARN, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    assert (read("llama", **both).rope.theta, read("llama", **both).rope.ignored_theta) == (1e4, 1e6)
    for keys in (both | {"rope_theta": 1e6}, {"rope_parameters": both["rope_parameters"]}, {"rope_scaling": YARN}):
        assert read("llama", **keys).rope.ignored_theta is None


def test_yarn_stretches_the_length_before_it(read):
    for length, given, context in ((40, 32, 128), (128, 32, 128), (300, 32, 300), (100, None, 400)):
        original = {} if given is None else {"original_max_position_embeddings": given}
        config = read("llama", rope_scaling={"type": "yarn", "factor": 4} | original, max_position_embeddings=length)
        assert config.context_len == context


def test_biases(read):
    for model_type in ("llama", "qwen3", "qwen3_moe"):
        config = read(model_type, attention_bias=True, num_key_value_heads=4)
        assert config.traits.qkv_bias and config.traits.o_bias
    assert read("llama", mlp_bias=True).traits.mlp_bias
    for value in (True, False):
        config = read("qwen2", attention_bias=value, num_key_value_heads=4)
        assert config.traits.qkv_bias and not config.traits.o_bias


@pytest.mark.parametrize(
    ("keys", "dtype"),
    [
        ({"torch_dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "torch.float16"}, "float16"),
        ({"dtype": None, "torch_dtype": "half"}, "float16"),
        ({"dtype": "bfloat16", "torch_dtype": "float16"}, "bfloat16"),
        ({"dtype": None, "torch_dtype": None}, "float32"),
    ],
)
def test_dtype(read, keys, dtype):
    assert read("llama", **keys).dtype == dtype


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_a_dtype_that_is_none_is_named_unless_a_flag_gives_another(read, key):
    for value in ("auto", "float8_e4m3fn", 16, {"": "bfloat16"}, "", True):
        with pytest.raises(ValueError, match=rf"config.json: '{key}' .* is not supported; use --dtype with one of"):
            read("llama", **{key: value})
        assert read("llama", flag="bfloat16", **{key: value}).dtype == "bfloat16"


HARMLESS = {
    "use_cache": False, "pretraining_tp": 2, "attention_dropout": 0.5, "initializer_range": None, "pad_token_id": -1,
    "auto_map": {"AutoConfig": "x"}, "transformers_version": "4.1", "_name_or_path": "x", "max_length": 20,
    "temperature": 0.6, "top_k": None, "do_sample": True, "output_router_logits": True, "router_aux_loss_coef": 1,
    "is_causal": True, "attn_output_gate": False, "partial_rotary_factor": 1.0, "clip_qkv": None, "mlp_only_layers": [],
    "decoder_sparse_step": 1, "model_max_length": 9, "is_decoder": True, "per_layer_config": None,
    "unsloth_fixed": True, "use_mrope": False, "shared_expert_intermediate_size": 0, "attn_logit_softcapping": None,
    "quantization_config": None, "rope_interleaved": False, "num_experts": 0, "torchscript": False, "qkv_bias": False,
    "use_qk_norm": False, "loss_type": "ForCausalLM",
}  # fmt: skip


def test_harmless_keys_are_harmless(read):
    assert read("llama", **HARMLESS) == read("llama")


UNREAD = (
    ("is_causal", False), ("is_causal", None), ("is_causal", 1), ("attn_output_gate", True),
    ("partial_rotary_factor", 0.5), ("clip_qkv", 8.0), ("clip_qkv", False), ("per_layer_config", {"0": {}}),
    ("mlp_only_layers", [0]), ("decoder_sparse_step", 2), ("shared_expert_intermediate_size", 64),
    ("attn_logit_softcapping", 50.0), ("use_qk_norm", True), ("no_such_key", False), ("no_such_key", 0),
    ("text_config", {"hidden_size": 8}), ("is_encoder_decoder", True), ("num_local_experts", 8),
    ("dual_chunk_attention_config", {"chunk_size": 8}), ("quantization", "x"), ("embedding_multiplier", 12.0),
)  # fmt: skip


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_an_unread_key_that_may_change_the_computation_is_named(read, model_type):
    for key, value in UNREAD:
        with pytest.raises(ValueError, match=rf"config.json \({NAMES[model_type]}\): '{key}' "):
            read(model_type, **{key: value})


def test_all_such_keys_are_named_at_once(read):
    message = r"'is_causal' is supported only as true; got False; 'a' \(1\), 'b\\n' \(False\): not known for this arch"
    with pytest.raises(ValueError, match=message):
        read("qwen2", num_key_value_heads=4, **{"a": 1, "is_causal": False, "b\n": False, "c": None})
    with pytest.raises(ValueError, match=r"'k11' \(0\) and 288 more: not known") as error:
        read("llama", **{f"k{index}": 0 for index in range(300)} | {"k0": "x" * 999})
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("key", ["hidden_size", "num_attention_heads", "vocab_size", "max_position_embeddings"])
def test_a_size_is_a_positive_integer(read, key):
    for value in (None, True, 0, -1, 64.0, "64", [64], math.nan, math.inf, 10**400):
        with pytest.raises(ValueError, match=rf"config.json: '{key}' must be (a positive integer; got|at most)"):
            read("llama", **{key: value})


@pytest.mark.parametrize("key", ["rope_theta", "rms_norm_eps"])
def test_a_number_is_finite_and_not_negative(read, key):
    for value in (None, True, -1.0, "1e4", [], math.nan, math.inf, 10**400):
        with pytest.raises(
            ValueError, match=rf"config.json: '{key}' must be a (positive number|number of at least 0);"
        ):
            read("llama", **{key: value})


@pytest.mark.parametrize(
    ("model_type", "keys", "message"),
    [
        ("llama", {"tie_word_embeddings": 1}, "'tie_word_embeddings' must be true or false; got 1"),
        ("llama", {"attention_bias": None}, "'attention_bias' must be true or false; got None"),
        ("llama", {"hidden_act": "relu2"}, "'hidden_act' must be one of silu, swish, gelu, .*; got 'relu2'"),
        ("llama", {"hidden_act": None}, "'hidden_act' must be one of"),
        ("llama", {"num_hidden_layers": 10**9}, "'num_hidden_layers' must be at most 4096; got 1000000000"),
        ("llama", {"head_dim": 15}, "'head_dim' must be an even number; got 15"),
        ("llama", {"num_attention_heads": 7}, r"'head_dim' is missing, and hidden_size \(64\) is not a multiple"),
        ("mistral", {"num_attention_heads": 64}, r"'head_dim' is missing, and hidden_size \(64\) / num_attention"),
        ("llama", {"num_key_value_heads": 3}, r"num_attention_heads \(8\) is not a multiple of num_key_value_heads"),
        ("mistral", {"num_key_value_heads": None}, "'num_key_value_heads' must be a positive integer; got None"),
        ("qwen2", {"head_dim": None}, "'head_dim' must be a positive integer; got None"),
        ("qwen3", {"head_dim": None}, "'head_dim' must be a positive integer; got None"),
        ("qwen2", {"use_sliding_window": None}, "'use_sliding_window' must be true or false; got None"),
        ("qwen2", {"use_sliding_window": 1}, "'use_sliding_window' must be true or false; got 1"),
        ("qwen2", {"max_window_layers": -1}, "'max_window_layers' must be an integer of at least 0; got -1"),
        ("mistral", {"sliding_window": 0}, "'sliding_window' must be a positive integer; got 0"),
        ("mistral", {"sliding_window": True}, "'sliding_window' must be an integer of at least 0; got True"),
        ("qwen3", {"layer_types": ["full_attention"]}, "'layer_types' must give full_attention or sliding_attention"),
        ("llama", {"layer_types": ["linear_attention"] * 4}, "'layer_types' must give full_attention or sliding"),
        ("llama", {"layer_types": "full_attention"}, "'layer_types' must give full_attention or sliding_attention"),
        ("mixtral", {"layer_types": [["full_attention"]] * 4}, "'layer_types' must give full_attention or sliding"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 4, "sliding_window": 8},
         "'layer_types' has sliding_attention, but no 'sliding_window' is in use"),
        ("qwen3_moe", {"num_experts": 8, "num_local_experts": 4},
         r"'num_experts' \(8\) and 'num_local_experts' \(4\) are two names of one number, and differ"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named(read, model_type, keys, message):
    given = {"num_key_value_heads": 4} if model_type.startswith("qwen") else {}
    with pytest.raises(ValueError, match=f"config.json: {message}"):
        read(model_type, **(given | keys))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"rope_scaling": {"type": "ntk", "factor": 4.0}},
            "rope type 'ntk' of 'rope_scaling' is not supported",
        ),
        (
            {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}, "rope_scaling": {"rope_type": "longrope"}},
            "'short_factor' of 'rope_scaling' must have a positive number for each of the 4 pairs of columns",
        ),
        ({"rope_scaling": YARN | {"attn_factor": 0.88}}, r"'attn_factor' \(0.88\) of 'rope_scaling' is not supported"),
        ({"rope_scaling": {"type": "yarn"}}, "rope type 'yarn' needs a positive number 'factor'; got None"),
        ({"rope_scaling": YARN | {"truncate": None}}, "'truncate' of 'rope_scaling' must be true or false; got None"),
        (
            {"rope_scaling": YARN | {"beta_fast": "32"}},
            "'beta_fast' of 'rope_scaling' must be a positive number; got '32'",
        ),
        ({"rope_scaling": YARN | {"attention_factor": 0}}, "'attention_factor' of 'rope_scaling' must be a positive"),
        (
            {"rope_scaling": YARN | {"low_freq_factor": 1}},
            r"'low_freq_factor' \(1\) of 'rope_scaling' is not supported",
        ),
        ({"rope_scaling": YARN, "rope_theta": 1}, "'rope_theta' must not be 1 with rope type 'yarn'; got 1.0"),
        (
            {
                "rope_scaling": LLAMA3 | {"original_max_position_embeddings": None},
                "original_max_position_embeddings": 8,
            },
            "needs a positive number 'original_max_pos",
        ),
        ({"rope_parameters": {"rope_type": None}}, "rope type None of 'rope_parameters' is not supported"),
        ({"rope_parameters": {"rope_type": ["linear"]}}, r"rope type \['linear'\] of 'rope_parameters'"),
        ({"rope_scaling": "linear"}, "'rope_scaling' must be an object or null; got 'linear'"),
        ({"rope_parameters": []}, r"'rope_parameters' must be an object or null; got \[\]"),
        ({"rope_parameters": {"rope_theta": None}}, "'rope_theta' must be a positive number; got None"),
        ({"rope_scaling": {"factor": 4.0}}, r"'factor' \(4.0\) of 'rope_scaling' is not supported with rope type 'def"),
        ({"rope_scaling": {"type": "linear"}}, "rope type 'linear' needs a positive number 'factor'; got None"),
        ({"rope_scaling": {"type": "linear", "factor": True}}, "rope type 'linear' needs a positive number 'factor'"),
        (
            {"rope_scaling": {"type": "linear", "factor": 1e300}},
            r"'factor' \(1e\+300\) gives the model .* tokens",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2, "beta_fast": 8}}, r"'beta_fast' \(8\) of 'rope_scaling'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, r"'partial_rotary_factor' \(0.5\) of 'rope_parameters'"),
        ({"rope_parameters": {"mrope_section": [1, 1]}}, r"'mrope_section' \(\[1, 1\]\) of 'rope_parameters'"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}},
            r"'rope_parameters' by layer type \(full_attention, sliding_attention\) is not supported",
        ),
        (
            {"rope_scaling": LLAMA3, "original_max_position_embeddings": None},
            "needs a positive number 'original_max_pos",
        ),
        (
            {"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}},
            r"'high_freq_factor' \(4.0\) of 'rope_scaling' must be above",
        ),
    ],
)
def test_a_wrong_rope_is_named(read, keys, message):
    with pytest.raises(ValueError, match=f"config.json: .*{message}"):
        read("llama", **keys)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"architectures": None}, "'architectures' must name the model's class in a list; got None"),
        ({"architectures": "LlamaForCausalLM"}, "'architectures' must name the model's class in a list; got 'Llama"),
        ({"architectures": [None]}, "'architectures' must name the model's class in a list"),
        ({"architectures": ["LlamaForCausalLM", "LlamaModel"]},
         "'architectures' names several classes .LlamaForCausalLM, LlamaModel., which compute different things"),
        ({"architectures": ["BambaForCausalLM"], "rope_scaling": {"rope_type": "yarn"}, "hidden_size": None},
         "architecture 'BambaForCausalLM' is not supported; supported are .*LlamaForCausalLM, .*Qwen3MoeForCausalLM"),
        ({"architectures": ["XForConditionalGeneration"], "text_config": {}, "num_attention_heads": None},
         r"architecture 'XForConditionalGeneration' \(a multimodal config, whose parts lie in 'text_config'\) is not"),
        ({"architectures": ["XForCausalLM"], "text_config": {}}, r"architecture 'XForCausalLM' \(a nested config"),
        ({"architectures": [], "vision_config": {}}, r".*got \[\] \(a multimodal config, whose parts lie in 'vision_"),
        ({"model_type": None}, "'model_type' of architecture 'LlamaForCausalLM' must be 'llama'; got None"),
        ({"model_type": "mistral"}, "'model_type' of architecture 'LlamaForCausalLM' must be 'llama'; got 'mistral'"),
    ],
)  # fmt: skip
def test_the_architecture_is_judged_first(read, keys, message):
    with pytest.raises(ValueError, match=f"config.json: {message}"):
        read("llama", **keys)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"clip_qkv": 8.0, "alibi": None}, r"Ramet lacks clipped queries, keys and values \('clip_qkv'\)$"),
        ({"layer_types": ["mamba", "full_attention"], "linear_attn_config": {"num_heads": 16}},
         r"lacks other linear attention than gated delta nets \('linear_attn_config'\); layers of type 'mamba'$"),
        ({"hidden_act": "relu2", "norm_eps": 1e-5}, r"lacks layer norms \('norm_eps'\); the activation 'relu2'$"),
        ({"swiglu_limit": 7.0, "a": 1, "b": None, "c": False},
         r"lacks clamped gates of experts \('swiglu_limit'\); no family here has the keys 'a'$"),
        ({"text_config": {"clip_qkv": 8.0, "index_topk": 2048}, "no_key_of_text": 1}, r"values \('clip_qkv'\)$"),
        ({"partial_rotary_factor": 0.5, "n_shared_experts": 1}, "all keys of its config are known, so an entry may be"),
    ],
)  # fmt: skip
def test_an_unknown_architecture_is_told_what_is_missing(read, keys, message):
    with pytest.raises(ValueError, match=f"'XForCausalLM'.* is not supported; supported are .*; .*{message}"):
        read("llama", architectures=["XForCausalLM"], **keys)


def test_the_same_architecture_twice_is_one(read):
    assert read("llama", architectures=["LlamaForCausalLM"] * 2).architecture == "LlamaForCausalLM"


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' + "9" * 5000 + "}", "[]", "", "\ufeff{}"])
def test_a_file_that_is_no_config_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json "):
        ModelConfig.from_path(str(tmp_path))


def test_what_generation_config_says_of_lengths_is_not_the_models(tmp_path):
    folder = rm.make_config(tmp_path, "llama2")
    generation = {"max_length": 20, "max_new_tokens": 7, "temperature": 0.6, "sliding_window": 4, "is_causal": False}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    config = ModelConfig.from_path(str(folder))
    assert (config.context_len, [layer.window for layer in config.layers]) == (512, [None] * 3)


@pytest.mark.parametrize("family", rm.COMPOSED)
def test_a_composed_models_text_model_is_read(tmp_path, family):
    whole, text, _ = rm.COMPOSED[family]
    folder = rm.make_config(tmp_path, family)
    config = json.loads((folder / "config.json").read_text())

    def read(**keys):
        (folder / "config.json").write_text(json.dumps(config | keys))
        return ModelConfig.from_path(str(folder))

    read_config = read(eos_token_id=[7], text_config=config["text_config"] | {"eos_token_id": 9})
    assert read_config.architecture == whole["architectures"][0]
    assert (read_config.dtype, read_config.eos_token_ids) == ("float32", (7, 9))
    assert read_config.tie_word_embeddings == whole["tie_word_embeddings"]  # whatever the text model's config says
    assert read(dtype="bfloat16").dtype == "bfloat16"
    for keys, message in (
        ({"text_config": None}, "'text_config' of architecture '.*' must be an object; got None"),
        ({"text_config": {"model_type": "bert"}}, "'model_type' in 'text_config' of architecture .* must be '"),
        ({"new_projector": 1}, r"'new_projector' \(1\): not known for this architecture"),
        ({"text_config": config["text_config"] | {"clip": 1.0}}, r"'clip' \(1.0\): not known for this architecture"),
        ({"model_type": "llama"}, f"'model_type' of architecture '.*' must be '{whole['model_type']}'; got 'llama'"),
    ):
        with pytest.raises(ValueError, match=message):
            read(**keys)


def test_the_test_models_are_read(tmp_path):
    for family in rm.FAMILIES:
        assert ModelConfig.from_path(str(rm.make_config(tmp_path, family))).num_hidden_layers == 3
