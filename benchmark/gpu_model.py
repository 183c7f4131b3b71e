"""Owns the random model of the benchmarks on GPUs: its shape, and its files. Measures nothing."""

import json
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from string import ascii_lowercase
from typing import Any

from bench_common import ROOT

SHAPE: dict[str, Any] = {  # Qwen3-8B's published config
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096,
    "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128, "rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False,
    "max_position_embeddings": 40960, "rope_theta": 1000000.0, "attention_bias": False, "dtype": "bfloat16",
    "eos_token_id": 151645,
}  # fmt: skip
SMALL: dict[str, Any] = SHAPE | {  # Qwen3-0.6B's published config
    "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
    "tie_word_embeddings": True,
}  # fmt: skip
EXPERTS_SHAPE: dict[str, Any] = SHAPE | {  # Qwen3-30B-A3B's published config
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144,
    "num_hidden_layers": 48, "num_key_value_heads": 4, "moe_intermediate_size": 768, "num_experts": 128,
    "num_experts_per_tok": 8, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip
TINY: dict[str, Any] = SHAPE | {  # for a run on a CPU, which only shows that all of it works
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "eos_token_id": 2,
}  # fmt: skip
TINY_EXPERTS: dict[str, Any] = EXPERTS_SHAPE | {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2,
    "max_position_embeddings": 512, "eos_token_id": 2,
}  # fmt: skip
LATENT_SHAPE: dict[str, Any] = {  # DeepSeek-V3's published widths and format, in fewer layers and experts
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": 129280,
    "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 8,
    "first_k_dense_replace": 1, "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 64,
    "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "norm_topk_prob": True,
    "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "num_nextn_predict_layers": 0,
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "attention_bias": False,
    "max_position_embeddings": 163840, "rope_theta": 10000, "rope_scaling": {
        "type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
    },
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                            "weight_block_size": [128, 128]},
    "torch_dtype": "bfloat16", "eos_token_id": 1,
}  # fmt: skip
SPARSE_KEYS: dict[str, Any] = {  # what DeepSeek-V3.2 has beside these
    "architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32", "index_n_heads": 64,
    "index_head_dim": 128, "index_topk": 2048,
}  # fmt: skip
HYBRID_SHAPE: dict[str, Any] = {  # Qwen3.5's dense shape of 9 billion parameters
    "architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5_text", "vocab_size": 248320, "hidden_size": 4096,
    "intermediate_size": 12288, "num_hidden_layers": 32, "num_attention_heads": 16, "num_key_value_heads": 4,
    "head_dim": 256, "full_attention_interval": 4, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128,
    "linear_value_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32, "rms_norm_eps": 1e-6,
    "hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": False, "max_position_embeddings": 262144,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000000, "partial_rotary_factor": 0.25},
    "dtype": "bfloat16", "eos_token_id": 248044,
}  # fmt: skip
TINY_HYBRID: dict[str, Any] = HYBRID_SHAPE | {  # see TINY
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "max_position_embeddings": 512, "eos_token_id": 2,
}  # fmt: skip
NUM_FILES = 8


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The checkpoint tensors of a Qwen3 model."""
    hidden, size, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for name, shape in {
            "self_attn.q_proj": (q, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, q), "self_attn.q_norm": (dim,), "self_attn.k_norm": (dim,),
            "mlp.gate_proj": (size, hidden), "mlp.up_proj": (size, hidden), "mlp.down_proj": (hidden, size),
            "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
        }.items():  # fmt: skip
            shapes[f"{prefix}.{name}.weight"] = shape
    vocab = (config["vocab_size"], hidden)
    return shapes | {"model.embed_tokens.weight": vocab, "model.norm.weight": (hidden,), "lm_head.weight": vocab}


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    """A model folder without weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_model(folder: Path, config: dict[str, Any], device: str = "cuda") -> Path:
    """Write the random model in several files, unless it is there."""
    if (folder / "tokenizer.json").is_file() and json.loads((folder / "config.json").read_text()) == config:
        return folder
    write_config(folder, config)
    shapes = list(tensor_shapes(config).items())
    files = [dict(shapes[start::NUM_FILES]) for start in range(NUM_FILES)]
    names = [f"model-{number + 1:05}-of-{NUM_FILES:05}.safetensors" for number in range(NUM_FILES)]
    with ThreadPoolExecutor(NUM_FILES) as pool:
        list(pool.map(lambda name, shapes: _write_file(folder / name, shapes, device), names, files))
    weight_map = {tensor: name for name, shapes in zip(names, files, strict=True) for tensor in shapes}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    write_large_tokenizer(folder, config["vocab_size"])
    return folder


def write_large_tokenizer(folder: Path, vocab_size: int) -> None:
    """A tokenizer of that many tokens, trained on words that mean nothing: real ones take as long to read."""
    sys.path.insert(0, str(ROOT / "test"))
    from random_models import write_tokenizer

    generator = random.Random(0)
    words = ("".join(generator.choices(ascii_lowercase, k=generator.randint(4, 9))) for _ in range(vocab_size))
    write_tokenizer(folder, vocab_size=vocab_size, text=" ".join(words))


def _write_file(path: Path, shapes: dict[str, tuple[int, ...]], device: str) -> None:
    """One safetensors file (huggingface/safetensors, README, "Format"), tensor by tensor as they are made."""
    import torch

    header, offset = {}, 0
    for name, shape in shapes.items():
        nbytes = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            values = torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(
                std=1.0 if len(shape) == 1 else 0.02
            )
            rest = memoryview(values.view(torch.uint8).cpu().numpy()).cast("B")
            while rest:  # one write moves at most 2 GB
                rest = rest[file.write(rest) :]
