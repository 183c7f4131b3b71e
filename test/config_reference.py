"""Owns what transformers makes of a config, in the terms of Ramet's ModelConfig, and the comparison of the two."""

import atexit
import functools
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from ramet.srt.configs.harmless_keys import ANY, HARMLESS_KEYS
from ramet.srt.configs.model_config import ModelConfig
from ramet.srt.configs.rope_config import RopeConfig
from ramet.srt.layers.rotary_embedding import inverse_frequencies
from ramet.srt.models.decoder import NORM_NAMES

MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "logits_scaling")
INVERSE_FREQUENCIES = ("inv_freq", "full_attention_inv_freq", "sliding_attention_inv_freq")
HYBRIDS = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
GROUPED_ROUTERS = {
    "glm4_moe": "Glm4MoeForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "glm4_moe_lite": "Glm4MoeLiteForCausalLM",
    "deepseek_v32": "DeepseekV32ForCausalLM",
    "glm_moe_dsa": "GlmMoeDsaForCausalLM",
}
INDEX_TENSORS = ("wq_b.weight", "wk.weight", "weights_proj.weight", "k_norm.bias")
ROUTER = ("num_group", "topk_group", "routed_scaling_factor")
SMALL = 2_000_000  # parameters: such models run once, as some configs fail only then


class Disagreement(AssertionError):
    """Ramet accepts a config, and computes something else than transformers, or what transformers can't."""


@functools.cache
def _folder() -> Path:
    """One for all: to make one for each of thousands of configs takes longer than to read them."""
    folder = tempfile.mkdtemp(prefix="ramet-config-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def written(config: dict[str, Any]) -> str:
    """A folder whose config.json has this content, until the next call."""
    (_folder() / "config.json").write_text(json.dumps(config))
    return str(_folder())


def read(config: dict[str, Any]) -> ModelConfig:
    """Ramet's reading of a config.json with this content. Raises ValueError where it is refused."""
    return ModelConfig.from_path(written(config))


def reference(config: dict[str, Any]) -> dict[str, Any]:
    """What transformers makes of it, by the names of `ours`. Raises whatever transformers raises."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers import logging as hf_logging
    from transformers.initialization import no_init_weights

    hf_logging.set_verbosity_error()
    hf = AutoConfig.from_pretrained(written(config))
    if getattr(hf, "quantization_config", None) is not None:
        del hf.quantization_config  # the shapes are asked for, and no quantiser's package
    dtype, hf.dtype = hf.dtype, torch.float32
    hf.pad_token_id = None  # a default of the class may be beyond the vocabulary
    hf._experts_implementation = "eager"  # the others want sizes that are multiples of 4
    with torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(hf, attn_implementation="eager")
        model.tie_weights()
    rotary = type(model.model.rotary_emb)(hf)
    experts = next((one for one in model.modules() if hasattr(one, "e_score_correction_bias")), None)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    place = next(index for index, one in enumerate(model.model.layers) if hasattr(one, "self_attn"))
    layer, attention = model.model.layers[place], f"model.layers.{place}.self_attn"
    is_hybrid = hf.model_type in HYBRIDS
    shapes |= _split_shapes(shapes, hf, layer)
    latent = _latent(layer.self_attn, shapes) if hasattr(layer.self_attn, "kv_lora_rank") else None
    facts = {
        "architecture": type(model).__name__.replace("MinistralFor", "MistralFor"),
        "dtype": str(dtype or torch.float32).removeprefix("torch."),
        "num_hidden_layers": len(model.model.layers),
        "vocab_size": shapes["model.embed_tokens.weight"][0],
        "hidden_size": shapes["model.embed_tokens.weight"][1],
        "query_columns": None if latent else shapes[f"{attention}.q_proj.weight"][0] // (1 + is_hybrid),
        "key_columns": None if latent else shapes[f"{attention}.k_proj.weight"][0],
        "head_dim": rotary.inv_freq.shape[0] * 2 if latent else layer.self_attn.head_dim,
        "latent": latent,
        "qkv_bias": any(f"{attention}.{name}.bias" in shapes for name in ("q_proj", "kv_a_proj_with_mqa")),
        "o_bias": f"{attention}.o_proj.bias" in shapes,
        "mlp_bias": any(name.startswith("model.layers.0.mlp") and name.endswith("_proj.bias") for name in shapes),
        "rms_norm_eps": getattr(model.model.norm, "variance_epsilon", None) or getattr(model.model.norm, "eps", 0),
        "hidden_act": hf.hidden_activation if hf.model_type.startswith("gemma") else hf.hidden_act,
        "tie_word_embeddings": model.lm_head.weight is model.model.embed_tokens.weight,
        "is_causal": bool(getattr(hf, "is_causal", True)),
        "inverse_frequencies": [
            getattr(rotary, name).tolist() for name in INVERSE_FREQUENCIES if getattr(rotary, name, None) is not None
        ],
        "attention_scaling": getattr(
            rotary, "attention_scaling", getattr(rotary, "full_attention_attention_scaling", 1.0)
        ),
        "max_position_embeddings": hf.max_position_embeddings,
        "layer_windows": _windows(hf),
        "mlps": [_mlp(shapes, f"model.layers.{index}.mlp") for index in range(len(model.model.layers))],
        "soft_caps": [
            hf.final_logit_softcapping if hf.model_type.startswith("gemma") else None,
            hf.attn_logit_softcapping if hf.model_type == "gemma2" else None,
        ],
        "router": [float(getattr(experts, name, 1)) for name in ROUTER]
        if hf.model_type in GROUPED_ROUTERS and experts
        else None,
        "num_experts_per_tok": hf.num_experts_per_tok if _has_experts(shapes) else None,
        "norm_topk_prob": hf.norm_topk_prob
        if _has_experts(shapes) and hf.model_type not in ("mixtral", "minimax_m2", "gpt_oss", "qwen3_5_moe_text")
        else None,
        "rotates": [
            hasattr(one, "self_attn") and bool(getattr(one.self_attn, "use_rope", True)) for one in model.model.layers
        ],
        "delta": _delta(model.model.layers),
        "attention_scale": layer.self_attn.scaling,
        "multipliers": [
            getattr(model.model.embed_tokens, "scalar_embed_scale", 1.0),
            *(getattr(hf, name) if hf.model_type == "granite" else 1.0 for name in MULTIPLIERS),
        ],
        "qk_norm": shapes.get(f"{attention}.q_norm.weight"),
        "indices": ["self_attn.indexer.wk.weight" in dict(one.named_parameters()) for one in model.model.layers],
        "layer_norms": sorted(name for name in shapes if re.fullmatch(r"model\.layers\.0\.\w+layernorm\.weight", name)),
        "shared_size": _shared_size(shapes) if _has_experts(shapes) else None,
    }
    if sum(parameter.numel() for parameter in model.parameters()) < SMALL:
        _run(model, hf.vocab_size)
    return facts


def _run(model: Any, vocab_size: int) -> None:
    """One pass of a model that was made without memory, all of whose numbers are 0: only shapes matter."""
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
        model(torch.arange(20)[None] % vocab_size, use_cache=False)


def _delta(layers: Any) -> list[tuple[int, ...]]:
    """Heads, their columns and the kernel of each linear layer; those of attention have none."""
    return [
        (one.num_k_heads, one.num_v_heads, one.head_k_dim, one.head_v_dim, one.conv_kernel_size)
        for one in (getattr(layer, "linear_attn", None) for layer in layers)
        if one is not None
    ]


def _windows(hf: Any) -> list[int | None]:
    """By what the classes look at: Llama at nothing, some at the window alone, some at the layer types as well."""
    if hf.model_type == "llama":
        return [None] * hf.num_hidden_layers
    if hf.model_type in ("granite", "olmo2", "seed_oss", "minimax_m2", *GROUPED_ROUTERS, *HYBRIDS):
        return [None] * hf.num_hidden_layers
    if hf.model_type in (
        "ministral",
        "qwen2",
        "qwen3",
        "qwen2_moe",
        "smollm3",
        "olmo3",
        "gemma2",
        "gemma3_text",
        "gpt_oss",
    ):
        return [hf.sliding_window if kind == "sliding_attention" else None for kind in hf.layer_types]
    return [hf.sliding_window] * hf.num_hidden_layers


def _has_experts(shapes: dict[str, tuple[int, ...]]) -> bool:
    return any(".experts." in name for name in shapes)


def _split_shapes(shapes: dict[str, tuple[int, ...]], hf: Any, layer: Any) -> dict[str, tuple[int, ...]]:
    """Those of q, k, gate and up of a class that has them in fused matrices."""
    parts: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if ".qkv_proj." in name:
            for part, heads in (("q_proj", hf.num_attention_heads), ("k_proj", hf.num_key_value_heads)):
                parts[name.replace("qkv_proj", part)] = (heads * layer.self_attn.head_dim, *shape[1:])
        if ".mlp.gate_up_proj." in name:
            parts[name.replace("gate_up_proj", "up_proj")] = (shape[0] // 2, *shape[1:])
    return parts


def _shared_size(shapes: dict[str, tuple[int, ...]]) -> int:
    return next((size[0] for name, size in shapes.items() if ".shared_expert" in name and "up_proj" in name), 0)


def _latent(attention: Any, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Ranks and columns of latent attention, and the shapes that it has with them."""
    names = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    sizes = {name: getattr(attention, name) for name in names if getattr(attention, name) is not None}
    queries = "q_proj" if attention.q_lora_rank is None else "q_b_proj"
    columns = [shapes[f"model.layers.0.self_attn.{name}.weight"][0] for name in (queries, "kv_b_proj")]
    index = getattr(attention, "indexer", None)
    is_interleaved = index is not None or bool(attention.config.rope_interleave)
    found = {**sizes, "interleaved": is_interleaved, "columns": columns}
    if index is not None:
        names = {"index_n_heads": index.n_heads, "index_head_dim": index.head_dim, "index_topk": index.index_topk}
        found |= {**names, "index": [shapes[f"model.layers.0.self_attn.indexer.{name}"] for name in INDEX_TENSORS]}
    return found


def _latent_columns(config: ModelConfig) -> list[int]:
    latent, heads = config.traits.latent, config.num_attention_heads
    return [heads * latent.query_dim, heads * (latent.nope_dim + latent.value_dim)] if latent else []


def _index_shapes(config: ModelConfig) -> dict[str, Any]:
    latent = config.traits.latent
    if latent is None or latent.index is None:
        return {}
    num_heads, dim = latent.index.num_heads, latent.index.head_dim
    size = config.hidden_size
    return {"index": [(num_heads * dim, latent.q_rank), (dim, size), (num_heads, size), (dim,)]}


def _mlp(shapes: dict[str, tuple[int, ...]], prefix: str) -> tuple[int, int]:
    """(number of experts, width of one), or (0, width) of a plain MLP."""
    if f"{prefix}.up_proj.weight" in shapes:
        return 0, shapes[f"{prefix}.up_proj.weight"][0]
    experts, *sizes = shapes[f"{prefix}.experts.down_proj"]
    is_transposed = f"{prefix}.experts.down_proj_bias" in shapes  # gpt-oss's
    return experts, sizes[0] if is_transposed else sizes[1]


def ours(config: ModelConfig) -> dict[str, Any]:
    """The same of Ramet's reading."""
    moe = config.moe
    mlps = [
        (moe.num_experts, moe.intermediate_size) if moe and moe.sparse_layers[index] else (0, config.intermediate_size)
        for index in range(config.num_hidden_layers)
    ]
    latent = config.traits.latent
    stretched = config.rope.rope_type in ("linear", "yarn")
    sparse = moe is not None and any(moe.sparse_layers)
    return {
        "architecture": config.architecture,
        "dtype": config.dtype,
        "num_hidden_layers": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "query_columns": None if latent else config.num_attention_heads * config.head_dim,
        "key_columns": None if latent else config.num_key_value_heads * config.head_dim,
        "head_dim": config.head_dim,
        "latent": latent
        and {
            **latent.dimensions,
            "interleaved": latent.is_interleaved,
            "columns": _latent_columns(config),
            **_index_shapes(config),
        },
        "qkv_bias": config.traits.qkv_bias,
        "o_bias": config.traits.o_bias,
        "mlp_bias": config.traits.mlp_bias,
        "rms_norm_eps": config.traits.rms_norm_eps,
        "hidden_act": config.traits.hidden_act,
        "tie_word_embeddings": config.tie_word_embeddings,
        "is_causal": True,
        "inverse_frequencies": [inverse_frequencies(rope, config.head_dim).tolist() for rope in _ropes(config)],
        "attention_scaling": _ropes(config)[0].attention_factor,
        "max_position_embeddings": None if stretched else config.context_len,
        "layer_windows": [layer.window for layer in config.layers],
        "mlps": mlps,
        "soft_caps": [config.traits.logits_soft_cap, config.traits.attention_soft_cap],
        "router": [moe.num_groups, moe.num_kept_groups, moe.scaling_factor]
        if moe and sparse and config.architecture in GROUPED_ROUTERS.values()
        else None,
        "num_experts_per_tok": moe.num_experts_per_tok if moe and sparse else None,
        "norm_topk_prob": moe.norm_topk_prob if moe and sparse and not moe.traits.always_normalised else None,
        "rotates": [layer.rope is not None for layer in config.layers],
        "delta": [
            tuple(config.traits.delta.dimensions.values())
            for layer in config.layers
            if layer.is_linear and config.traits.delta is not None
        ],
        "attention_scale": config.traits.attention_scale,
        "multipliers": [
            config.traits.embedding_multiplier if config.traits.rounds_embedding_multiplier else 1.0,
            1.0 if config.traits.rounds_embedding_multiplier else config.traits.embedding_multiplier,
            config.traits.residual_multiplier,
            config.traits.logits_divisor,
        ],
        "qk_norm": {
            "": None,
            "head": (config.head_dim,),
            "all": (config.num_attention_heads * config.head_dim,),
        }[config.traits.qk_norm],
        "indices": [layer.owns_index for layer in config.layers],
        "layer_norms": sorted(f"model.layers.0.{name}.weight" for name in NORM_NAMES[config.traits.norms] if name),
        "shared_size": moe.shared_intermediate_size if moe and sparse else None,
    }


def _ropes(config: ModelConfig) -> list[RopeConfig]:
    """Those of layers with and without full attention, where they are not the same."""
    sliding = [
        layer.rope for layer in config.layers if layer.window is not None and layer.rope not in (None, config.rope)
    ]
    has_full = not sliding or any(layer.rope == config.rope for layer in config.layers)
    return [config.rope] * has_full + sliding[:1]


def refusal(config: dict[str, Any]) -> str | None:
    """Ramet's message if it refuses `config`."""
    try:
        ours(read(config))
    except ValueError as error:
        return str(error)
    return None


def compare(config: dict[str, Any]) -> str | None:
    """Read `config` in both ways. Returns Ramet's message if it refuses it, None if both are equal.

    Raises:
        Disagreement: if Ramet accepts it, and transformers has other values or fails.
    """
    message = refusal(config)
    if message is not None:
        return message
    got = ours(read(config))
    try:
        wanted = reference(config)
    except Exception:  # noqa: BLE001 - whatever transformers fails with
        try:
            wanted = reference(_without_pedantry(config))
        except Exception as error:  # noqa: BLE001 - this is what is compared
            raise Disagreement(f"transformers fails with {type(error).__name__}: {str(error)[:200]}") from None
    if got["max_position_embeddings"] is None:
        wanted["max_position_embeddings"] = None
    unlike = [f"{name}: {got[name]!r} instead of {wanted[name]!r}" for name in wanted if got[name] != wanted[name]]
    if unlike:
        raise Disagreement("; ".join(unlike))
    return None


def _without_pedantry(config: dict[str, Any]) -> dict[str, Any]:
    """Without what transformers refuses for its type alone: keys that change nothing, whole numbers for floats."""
    kept = {name: value for name, value in config.items() if HARMLESS_KEYS.get(name) is not ANY or name in WINDOW_KEYS}
    floats = ("rms_norm_eps", "routed_scaling_factor", "swiglu_limit")
    for name in (*floats, "final_logit_softcapping", "attn_logit_softcapping"):
        if type(kept.get(name)) is int:
            kept[name] = float(kept[name])
    return kept


WINDOW_KEYS = ("sliding_window", "use_sliding_window", "max_window_layers")
WRONG_VALUES = (None, True, False, 0, 1, -1, 7, 2.5, "x", [], ["x"], {"x": 1}, float("nan"), float("inf"), 10**400)
# Traits of other families, as their configs have them.
FOREIGN_KEYS: dict[str, list[Any]] = {
    "attn_logit_softcapping": [50.0], "final_logit_softcapping": [30.0], "query_pre_attn_scalar": [256],
    "embedding_multiplier": [12.0, 1.0], "residual_multiplier": [0.22, 1], "attention_multiplier": [0.015],
    "logits_scaling": [16.0, 1.0], "logit_scale": [0.0625], "clip_qkv": [8.0], "partial_rotary_factor": [0.5, 1.0],
    "rotary_pct": [0.25], "rope_local_base_freq": [10000.0], "no_rope_layers": [[1, 0, 1], []], "rope_ratio": [50],
    "n_shared_experts": [1, 0], "n_routed_experts": [64], "n_group": [8, 1], "topk_group": [4],
    "routed_scaling_factor": [2.5, 1.0], "scoring_func": ["sigmoid"], "first_k_dense_replace": [3, 0],
    "moe_layer_freq": [1, 2], "shared_expert_intermediate_size": [64, 0], "kv_lora_rank": [512], "q_lora_rank": [1536],
    "qk_rope_head_dim": [64], "index_topk": [2048], "num_nextn_predict_layers": [1, 0], "use_qk_norm": [True, False],
    "qk_layernorm": [True], "qkv_bias": [True, False], "attn_output_gate": [True, False], "use_mrope": [False, True],
    "linear_num_key_heads": [16], "full_attention_interval": [4], "attention_chunk_size": [8], "swiglu_limit": [7.0],
    "is_causal": [True, False, None, 1], "use_bidirectional_attention": [True], "layer_types": [["full_attention"] * 3],
    "per_layer_config": [{"0": {"sliding_window": 8}}, {}], "text_config": [{"hidden_size": 8}], "rope_type": ["yarn"],
    "original_max_position_embeddings": [64], "num_kv_shared_layers": [2], "hidden_activation": ["gelu"],
    "tie_encoder_decoder": [True], "is_decoder": [True], "max_length": [20], "temperature": [0.6], "top_k": [20],
    "do_sample": [True], "repetition_penalty": [1.1], "bad_words_ids": [[[5]]], "unsloth_fixed": [True],
    "pretraining_tp": [2], "auto_map": [{"AutoConfig": "x.Y"}], "transformers_weights": ["other.safetensors"],
}  # fmt: skip


def mutations(config: dict[str, Any], others: dict[str, list[Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, config with it changed): each key dropped, null and of other kinds; each of `others` added.

    Keys of which any value is harmless are only dropped and null.
    """
    for key in config:
        yield key, {name: value for name, value in config.items() if name != key}
        for value in WRONG_VALUES[:1] if HARMLESS_KEYS.get(key) is ANY else WRONG_VALUES:
            yield key, config | {key: value}
    for key in sorted(others.keys() - config.keys()):
        for value in (*others[key], None, False):
            yield key, config | {key: value}
