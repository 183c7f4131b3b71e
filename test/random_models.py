"""Makes small random Hugging Face models for tests, and the transformers answers to compare them with."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TOKENIZER_TEXT = (
    "A ramet is one plant of a clonal colony: the new one grows out of one that is already alive. "
    "The quick brown fox jumps over the lazy dog. Ein Ableger wächst aus der Mutterpflanze; çà et là, 植物は育つ. "
    '{"name": "strawberry", "runners": 12, "alive": true} 0123456789 def grow(parent): return parent.clone()\n'
)
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
BOS, EOS, IM_END = 1, 2, 4  # ids: the places in SPECIAL_TOKENS
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pth", "*.gguf")

# The shapes are as unlike each other as they can be: head counts, tying, head_dim, sizes that are no power of two.
_COMMON = {
    "vocab_size": 331,  # above the tokenizer's 320, as real models have it, and no multiple of 64
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 512,
    "num_hidden_layers": 3,
    "rms_norm_eps": 1e-5,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "use_cache": True,
}
_LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,  # short, so that a test prompt has all three kinds of frequencies
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama2": {  # as many key/value heads as query heads, untied
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 176,
        "num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": False, "attention_bias": False,
        "mlp_bias": False, "rope_theta": 10000.0, "rope_scaling": None,
    },
    "llama3": {  # grouped heads, llama3 rope scaling, tied
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 128, "intermediate_size": 208,
        "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True,
        "attention_bias": False, "mlp_bias": False, "rope_theta": 500000.0, "rope_scaling": _LLAMA3_SCALING,
        "eos_token_id": [EOS, IM_END],
    },
    "mistral": {  # one key/value head, a sliding window shorter than the test prompts, untied
        "model_type": "mistral", "architectures": ["MistralForCausalLM"], "hidden_size": 64, "intermediate_size": 144,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": False,
        "sliding_window": 12, "rope_theta": 10000.0, "rope_scaling": None,
    },
    "qwen2": {  # biases at q, k and v, three query heads for a key/value head, tied
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 96, "intermediate_size": 160,
        "num_attention_heads": 6, "num_key_value_heads": 2, "tie_word_embeddings": True, "use_sliding_window": False,
        "sliding_window": None, "max_window_layers": 3, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
        "rope_scaling": None,
    },
    "qwen3": {  # norms on q and k, heads wider together than the hidden size, untied
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_size": 80, "intermediate_size": 224,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": False,
        "attention_bias": False, "use_sliding_window": False, "sliding_window": None, "max_window_layers": 3,
        "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "rope_scaling": None,
    },
    "qwen3_moe": {  # experts but in the second layer, whose MLP is wider; no power of two among the expert counts
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 64,
        "intermediate_size": 112, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24,
        "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "norm_topk_prob": True,
        "decoder_sparse_step": 1, "mlp_only_layers": [1], "tie_word_embeddings": False, "attention_bias": False,
        "use_sliding_window": False, "sliding_window": None, "max_window_layers": 3, "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0, "rope_scaling": None,
    },
    "qwen2_moe": {  # a gated shared expert, biases on q, k and v, a window in the first layer
        "model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"], "hidden_size": 64,
        "intermediate_size": 112, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 40, "shared_expert_intermediate_size": 48,
        "norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": [2], "tie_word_embeddings": False,
        "qkv_bias": True, "use_sliding_window": True, "sliding_window": 12, "max_window_layers": 2,
        "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "rope_scaling": None,
    },
    "mixtral": {  # experts in every layer, a sliding window shorter than the test prompts
        "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "hidden_size": 64, "intermediate_size": 72,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 4,
        "num_experts_per_tok": 2, "tie_word_embeddings": False, "sliding_window": 12, "rope_theta": 10000.0,
        "rope_scaling": None,
    },
    "ministral3": {  # queries that grow with their position, YaRN with mscale
        "model_type": "ministral3", "architectures": ["Ministral3ForCausalLM"], "hidden_size": 64,
        "intermediate_size": 144, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "tie_word_embeddings": False, "sliding_window": None, "rope_theta": 10000.0, "rope_scaling": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 20, "beta_fast": 8.0,
            "mscale": 2.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.4,
        },
    },
    "phi3": {  # fused tensors, a part of each head rotates, by other frequencies beyond 40 tokens
        "model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "hidden_size": 64, "intermediate_size": 112,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True, "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 40, "rope_theta": 10000.0, "rope_scaling": {
            "rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
            "long_factor": [1.0, 1.5, 3.0, 5.0, 8.0, 13.0],
        }, "sliding_window": 200, "pad_token_id": None,
    },
    "granite": {  # multipliers of embedding, residual, attention and logits
        "model_type": "granite", "architectures": ["GraniteForCausalLM"], "hidden_size": 64, "intermediate_size": 144,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True, "attention_bias": True,
        "mlp_bias": True, "rope_theta": 10000.0, "rope_scaling": None, "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4, "attention_multiplier": 0.11, "logits_scaling": 1.7,
    },
    "olmo2": {  # norms behind attention and MLP, and over all heads of q and of k
        "model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"], "hidden_size": 64, "intermediate_size": 112,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False, "attention_bias": False,
        "rope_theta": 500000.0, "rope_scaling": None,
    },
    "olmo3": {  # OLMo-2 with windows in all layers but one, whose positions alone are scaled
        "model_type": "olmo3", "architectures": ["Olmo3ForCausalLM"], "hidden_size": 64, "intermediate_size": 112,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False, "attention_bias": False,
        "rope_theta": 400000.0, "sliding_window": 12, "layer_types": [
            "sliding_attention", "full_attention", "sliding_attention",
        ], "rope_scaling": {
            "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "attention_factor": 1.2,
            "beta_fast": 32.0, "beta_slow": 1.0,
        },
    },
    "smollm3": {  # a layer without positions, which has a window
        "model_type": "smollm3", "architectures": ["SmolLM3ForCausalLM"], "hidden_size": 64, "intermediate_size": 112,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True, "attention_bias": False,
        "mlp_bias": False, "rope_theta": 5000000.0, "rope_scaling": None, "no_rope_layers": [1, 0, 1],
        "use_sliding_window": True, "sliding_window": 12, "pad_token_id": None,
    },
    "seed_oss": {  # biases on q, k and v, and one of its own on the output
        "model_type": "seed_oss", "architectures": ["SeedOssForCausalLM"], "hidden_size": 64, "intermediate_size": 112,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 24, "tie_word_embeddings": False,
        "attention_bias": True, "attention_out_bias": True, "mlp_bias": False, "rope_theta": 10000000.0,
        "rope_scaling": None,
    },
    "gemma2": {  # soft caps on attention and logits, windows in every other layer
        "model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "hidden_size": 64, "intermediate_size": 112,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24, "tie_word_embeddings": True,
        "attention_bias": False, "hidden_act": None, "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 20, "sliding_window": 12, "rope_theta": 10000.0, "rope_scaling": None,
        "final_logit_softcapping": 6.0, "attn_logit_softcapping": 1.5,
    },
    "gemma3": {  # norms on both sides with an offset, rope and windows by layer type, a soft cap, a scaled embedding
        "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "hidden_size": 64,
        "intermediate_size": 112, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24,
        "tie_word_embeddings": True, "attention_bias": False, "hidden_act": None,
        "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 20, "sliding_window": 12,
        "sliding_window_pattern": 2, "rope_theta": 1000000.0,
        "rope_local_base_freq": 5000.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "final_logit_softcapping": 5.0,
    },
    "glm4_moe": {  # a part of each head rotates; sigmoid scores in groups, a shared expert; the first layer has none
        "model_type": "glm4_moe", "architectures": ["Glm4MoeForCausalLM"], "hidden_size": 64,
        "intermediate_size": 112, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24,
        "attention_bias": True, "use_qk_norm": True, "partial_rotary_factor": 0.5, "n_routed_experts": 8,
        "num_experts_per_tok": 3, "n_shared_experts": 2, "moe_intermediate_size": 40, "n_group": 4, "topk_group": 2,
        "routed_scaling_factor": 1.5, "norm_topk_prob": True, "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 0, "tie_word_embeddings": False, "rope_theta": 1000000.0, "rope_scaling": None,
    },
    "minimax_m2": {  # a part of each head rotates; norms over all heads; sigmoid scores
        "model_type": "minimax_m2", "architectures": ["MiniMaxM2ForCausalLM"], "hidden_size": 64,
        "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24, "rotary_dim": 16,
        "num_local_experts": 8, "num_experts_per_tok": 3, "tie_word_embeddings": False, "rope_theta": 5000000.0,
        "rope_scaling": None,
    },
    "gpt_oss": {  # sinks, windows in every other layer, biases, stacked experts with clamped gates, YaRN untruncated
        "model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": False,
        "attention_bias": True, "num_local_experts": 6, "num_experts_per_tok": 3, "sliding_window": 12,
        "swiglu_limit": 1.5, "rope_theta": 150000.0, "rope_scaling": {
            "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 40, "beta_fast": 32.0,
            "beta_slow": 1.0, "truncate": False,
        },
    },
    "deepseek_v3": {  # latent attention, YaRN with a factor of the scores; sigmoid scores in groups, a shared expert
        "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "hidden_size": 64,
        "intermediate_size": 112, "num_attention_heads": 6, "num_key_value_heads": 6, "q_lora_rank": 40,
        "kv_lora_rank": 48, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 20, "rope_interleave": True,
        "attention_bias": True, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 2,
        "moe_intermediate_size": 40, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.5,
        "norm_topk_prob": True, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0,
        "tie_word_embeddings": False, "rope_theta": 10000.0, "rope_scaling": {
            "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "beta_fast": 8.0,
            "mscale": 1.0, "mscale_all_dim": 2.0,
        },
    },
    "qwen3_next": {  # linear layers by key head, gated attention, a part of each head rotates, gated shared expert
        "model_type": "qwen3_next", "architectures": ["Qwen3NextForCausalLM"], "hidden_size": 64,
        "intermediate_size": 112, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24,
        "partial_rotary_factor": 0.5, "attention_bias": False, "layer_types": [
            "linear_attention", "full_attention", "linear_attention",
        ], "linear_conv_kernel_dim": 4, "linear_key_head_dim": 20, "linear_value_head_dim": 12,
        "linear_num_key_heads": 4, "linear_num_value_heads": 8, "num_experts": 8, "num_experts_per_tok": 3,
        "moe_intermediate_size": 40, "shared_expert_intermediate_size": 48, "norm_topk_prob": True,
        "decoder_sparse_step": 1, "mlp_only_layers": [1], "tie_word_embeddings": False, "rope_theta": 1000000.0,
        "rope_scaling": None,
    },
    "qwen3_5": {  # linear layers part by part, another kernel size, as many key heads as value heads
        "model_type": "qwen3_5_text", "architectures": ["Qwen3_5ForCausalLM"], "hidden_size": 64,
        "intermediate_size": 112, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24,
        "partial_rotary_factor": 0.5, "attention_bias": False, "layer_types": [
            "full_attention", "linear_attention", "linear_attention",
        ], "linear_conv_kernel_dim": 3, "linear_key_head_dim": 16, "linear_value_head_dim": 24,
        "linear_num_key_heads": 4, "linear_num_value_heads": 4, "tie_word_embeddings": True,
        "rope_theta": 1000000.0, "rope_scaling": None,
    },
    "glm4_moe_lite": {  # latent attention with queries of one matrix
        "model_type": "glm4_moe_lite", "architectures": ["Glm4MoeLiteForCausalLM"], "hidden_size": 64,
        "intermediate_size": 112, "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": None,
        "kv_lora_rank": 24, "qk_nope_head_dim": 20, "qk_rope_head_dim": 12, "v_head_dim": 28,
        "rope_interleave": False, "attention_bias": False, "n_routed_experts": 8, "num_experts_per_tok": 2,
        "n_shared_experts": 1, "moe_intermediate_size": 40, "n_group": 1, "topk_group": 1,
        "routed_scaling_factor": 1.8, "norm_topk_prob": True, "mlp_layer_types": ["sparse", "dense", "sparse"],
        "tie_word_embeddings": True, "rope_theta": 1000000.0, "rope_scaling": None,
    },
    "deepseek_v32": {  # latent attention to the 12 keys that an index chooses, whose pairs lie half its columns apart
        "model_type": "deepseek_v32", "architectures": ["DeepseekV32ForCausalLM"], "hidden_size": 64,
        "intermediate_size": 112, "num_attention_heads": 6, "num_key_value_heads": 6, "q_lora_rank": 40,
        "kv_lora_rank": 48, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 20, "index_topk": 12,
        "index_n_heads": 16, "index_head_dim": 20, "attention_bias": True, "n_routed_experts": 8,
        "num_experts_per_tok": 3, "n_shared_experts": 2, "moe_intermediate_size": 40, "n_group": 4, "topk_group": 2,
        "routed_scaling_factor": 1.5, "norm_topk_prob": True, "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 0, "tie_word_embeddings": False, "rope_theta": 10000.0, "rope_scaling": {
            "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "beta_fast": 8.0,
            "mscale": 1.0, "mscale_all_dim": 2.0,
        },
    },
    "glm_moe_dsa": {  # an index whose pairs are neighbours, and a layer that attends to what the one before has chosen
        "model_type": "glm_moe_dsa", "architectures": ["GlmMoeDsaForCausalLM"], "hidden_size": 64,
        "intermediate_size": 112, "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 32,
        "kv_lora_rank": 24, "qk_nope_head_dim": 20, "qk_rope_head_dim": 12, "v_head_dim": 28, "index_topk": 9,
        "index_n_heads": 16, "index_head_dim": 24, "index_topk_freq": 2, "attention_bias": False,
        "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 40,
        "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.8, "norm_topk_prob": True,
        "mlp_layer_types": ["dense", "sparse", "sparse"], "first_k_dense_replace": 1, "tie_word_embeddings": False,
        "num_nextn_predict_layers": 0, "rope_theta": 1000000.0, "rope_scaling": None,
    },
}  # fmt: skip
_PIXTRAL = {
    "model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "head_dim": 8, "image_size": 16, "patch_size": 4,
}  # fmt: skip
# Models with a part for pictures: the keys of the whole, and the text model's family with what is changed there.
COMPOSED: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "qwen3_vl": (
        {"model_type": "qwen3_vl", "architectures": ["Qwen3VLForConditionalGeneration"], "tie_word_embeddings": False,
         "vision_config": {"model_type": "qwen3_vl_vision", "depth": 1, "hidden_size": 16, "intermediate_size": 16,
                           "num_heads": 2, "out_hidden_size": 64, "deepstack_visual_indexes": [0], "patch_size": 4,
                           "num_position_embeddings": 16}},
        "qwen3",
        {"model_type": "qwen3_vl_text", "hidden_size": 64, "use_sliding_window": None, "sliding_window": None,
         "max_window_layers": None, "rope_scaling": {"rope_type": "default", "mrope_section": [6, 5, 5],
                                                     "mrope_interleaved": True}},
    ),
    "qwen3_vl_moe": (  # experts in stacks of transposed matrices
        {"model_type": "qwen3_vl_moe", "architectures": ["Qwen3VLMoeForConditionalGeneration"],
         "tie_word_embeddings": False,
         "vision_config": {"model_type": "qwen3_vl_moe_vision", "depth": 1, "hidden_size": 16, "intermediate_size": 16,
                           "num_heads": 2, "out_hidden_size": 64, "deepstack_visual_indexes": [0], "patch_size": 4,
                           "num_position_embeddings": 16}},
        "qwen3_moe",
        {"model_type": "qwen3_vl_moe_text", "hidden_size": 64, "head_dim": 32, "use_sliding_window": None,
         "sliding_window": None, "norm_topk_prob": True, "rope_scaling": {
             "rope_type": "default", "mrope_section": [6, 5, 5], "mrope_interleaved": True}},
    ),
    "qwen3_5_vl": (
        {"model_type": "qwen3_5", "architectures": ["Qwen3_5ForConditionalGeneration"], "tie_word_embeddings": True,
         "vision_config": {"model_type": "qwen3_5_vision", "depth": 1, "hidden_size": 16, "intermediate_size": 16,
                           "num_heads": 2, "out_hidden_size": 64, "num_position_embeddings": 16, "patch_size": 4}},
        "qwen3_5",
        {"rope_scaling": {"rope_type": "default", "mrope_section": [2, 2, 2], "mrope_interleaved": True,
                          "partial_rotary_factor": 0.5}},
    ),
    "qwen3_5_moe_vl": (
        {"model_type": "qwen3_5_moe", "architectures": ["Qwen3_5MoeForConditionalGeneration"],
         "tie_word_embeddings": False, "vision_config": {
             "model_type": "qwen3_5_moe_vision", "depth": 1, "hidden_size": 16, "intermediate_size": 16,
             "num_heads": 2, "out_hidden_size": 64, "num_position_embeddings": 16, "patch_size": 4}},
        "qwen3_next",
        {"model_type": "qwen3_5_moe_text", "mlp_only_layers": [], "rope_scaling": {
            "rope_type": "default", "mrope_section": [2, 2, 2], "mrope_interleaved": True,
            "partial_rotary_factor": 0.5}},
    ),
    "mistral3": (
        {"model_type": "mistral3", "architectures": ["Mistral3ForConditionalGeneration"], "tie_word_embeddings": True,
         "vision_config": _PIXTRAL, "image_token_index": 10},
        "mistral",
        {},
    ),
    "devstral": (
        {"model_type": "mistral3", "architectures": ["Mistral3ForConditionalGeneration"], "tie_word_embeddings": False,
         "vision_config": _PIXTRAL},
        "ministral3",
        {},
    ),
    "gemma3_vl": (
        {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "tie_word_embeddings": True,
         "mm_tokens_per_image": 4, "vision_config": {
             "model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 2, "image_size": 16, "patch_size": 4}},
        "gemma3",
        {"final_logit_softcapping": None},
    ),
}  # fmt: skip


def make_model(
    folder: str | Path,
    family: str,
    *,
    dtype: str = "float32",
    rope_spelling: str = "new",
    max_shard_size: str = "5GB",
    stacked_experts: bool = False,
    seed: int = 0,
    tokenizer: bool = True,
    **overrides: Any,
) -> Path:
    """Write a random model of `family` into `folder`: config, weights, tokenizer with a chat template.

    Args:
        family: one of FAMILIES.
        dtype: float32, bfloat16 or float16, of the stored weights.
        rope_spelling: "new" writes rope_parameters and dtype into config.json (transformers 5), "old" writes
            rope_theta, rope_scaling and torch_dtype.
        max_shard_size: below the model's size gives several files and an index, for example "100KB".
        stacked_experts: write a layer's experts as one tensor each, as transformers 5 has them in memory, and not
            in the spelling of published checkpoints.
        seed: of the weights; another seed is another model with the same layout.
        tokenizer: whether to write a tokenizer.
        overrides: entries of config.json, as the old spelling has them; a value of None stays null.

    Returns:
        `folder`.
    """
    import torch
    from transformers import AutoConfig

    if family not in FAMILIES and family not in COMPOSED:
        raise ValueError(f"family must be one of {', '.join((*FAMILIES, *COMPOSED))}; got {family!r}")
    if rope_spelling not in ("new", "old"):
        raise ValueError(f"rope_spelling must be new or old; got {rope_spelling!r}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = _whole_config(family, overrides)
    _write_config(folder, config, dtype, rope_spelling)
    with torch.device("cpu"):
        hf_config = AutoConfig.from_pretrained(folder)
        model = _auto_class(hf_config).from_config(hf_config)
    _randomize(model, seed)
    model.to(getattr(torch, dtype)).save_pretrained(
        folder, max_shard_size=max_shard_size, save_original_format=not stacked_experts
    )
    if family == "qwen3_vl_moe" and not stacked_experts:
        _turn_stacks(folder)
    _write_config(folder, config, dtype, rope_spelling)  # save_pretrained wrote transformers' own spelling
    if tokenizer:
        write_tokenizer(folder)
    return folder


def _turn_stacks(folder: Path) -> None:
    """Transpose the matrices of experts, as the published files have them; transformers reads both."""
    from safetensors.torch import load_file, save_file

    for file in folder.glob("*.safetensors"):
        turned = {
            name: tensor.transpose(1, 2).contiguous() if ".mlp.experts." in name else tensor
            for name, tensor in load_file(file).items()
        }
        save_file(turned, file, metadata={"format": "pt"})


def make_embedding_model(folder: str | Path, *, normalize: bool = True, **options: Any) -> Path:
    """Write a random model as Qwen3-Embedding is published: the decoder alone, its names without "model." in front.

    Args:
        normalize: whether the last token's hidden state is normalised.
        options: see make_model.
    """
    from safetensors.torch import load_file, save_file

    folder = make_model(folder, "qwen3", tie_word_embeddings=True, **options)
    weights = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("model."): value for name, value in weights.items() if name != "lm_head.weight"}
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    write_pooling(folder, normalize=normalize)
    return folder


def write_pooling(folder: Path, *, mode: str = "lasttoken", normalize: bool = True) -> None:
    """Write what sentence-transformers writes beside an embedding model."""
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), *([("2_Normalize", "Normalize")] if normalize else [])]
    entries = [
        {"idx": idx, "name": str(idx), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for idx, (path, kind) in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(entries))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    flags = {f"pooling_mode_{name}": name == mode for name in ("cls_token", "mean_tokens", "lasttoken")}
    pooling = {"word_embedding_dimension": 80, "include_prompt": True, **flags}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


def write_logit_score(folder: Path, true_token_id: int, false_token_id: int | None) -> None:
    """Write what sentence-transformers writes beside a decoder that ranks by its next token."""
    package = "sentence_transformers"
    entries = [
        {"idx": 0, "name": "0", "path": "", "type": f"{package}.base.modules.transformer.Transformer"},
        {
            "idx": 1,
            "name": "1",
            "path": "1_LogitScore",
            "type": f"{package}.cross_encoder.modules.logit_score.LogitScore",
        },
    ]
    (folder / "modules.json").write_text(json.dumps(entries))
    (folder / "1_LogitScore").mkdir(exist_ok=True)
    config = {"true_token_id": true_token_id, "false_token_id": false_token_id}
    (folder / "1_LogitScore" / "config.json").write_text(json.dumps(config))


def make_config(folder: str | Path, family: str, *, dtype: str = "float32", **overrides: Any) -> Path:
    """Write the config.json of a model of `family` and nothing else, without importing transformers."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    _write_config(Path(folder), _whole_config(family, overrides), dtype, "old")
    return Path(folder)


def _whole_config(family: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """The config of a family; of a composed one `overrides` change the text model's."""
    if family not in COMPOSED:
        return _COMMON | FAMILIES[family] | overrides
    whole, text, changes = COMPOSED[family]
    config = _COMMON | FAMILIES[text] | changes | overrides
    return whole | {"text_config": {key: value for key, value in config.items() if key != "architectures"}}


def _auto_class(config: Any) -> Any:
    """transformers' class that makes a model of a config."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM


def _write_config(folder: Path, config: dict[str, Any], dtype: str, rope_spelling: str) -> None:
    config = _spelled(dict(config), dtype, rope_spelling)
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def _spelled(config: dict[str, Any], dtype: str, rope_spelling: str) -> dict[str, Any]:
    if "text_config" in config:
        text = _spelled(dict(config["text_config"]), dtype, rope_spelling)
        return config | {"text_config": text, "dtype": dtype}
    if rope_spelling == "new" and config["model_type"] in ("gemma3_text", "olmo3"):
        full = {
            "rope_theta": config.pop("rope_theta"),
            **(config.pop("rope_scaling", None) or {"rope_type": "default"}),
        }
        sliding = {"rope_theta": config.pop("rope_local_base_freq", 500000.0), "rope_type": "default"}
        config["rope_parameters"] = {"full_attention": full, "sliding_attention": sliding}
        config["dtype"] = dtype
    elif rope_spelling == "new":
        rope = config.pop("rope_scaling", None) or {"rope_type": "default"}
        config["rope_parameters"] = {"rope_theta": config.pop("rope_theta"), **rope}
        config["dtype"] = dtype
    else:
        config["torch_dtype"] = dtype
    return config


def _randomize(model: Any, seed: int) -> None:
    """Fill every weight so that each of them shows in the logits, and greedy decoding does not repeat itself.

    Norms are around what they are made with, 1 or 0. Biases of routers are buffers, which are made as zeros.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    biases = [pair for pair in model.named_buffers() if pair[0].endswith("correction_bias")]
    with torch.no_grad():
        for name, parameter in (*model.named_parameters(), *biases):  # a tied head is not listed twice
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("A_log"):  # so that what is kept of a token fades over some tens of others
                parameter.copy_(noise - 2.0)
            elif name.endswith("sinks"):
                parameter.copy_(2.0 * noise)
            elif parameter.dim() == 1:
                parameter.copy_(0.3 * noise + (parameter if "norm" in name else 0.0))
            elif "embed_tokens" in name:
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(noise * 2.0 / parameter.shape[-1] ** 0.5)


def write_tokenizer(folder: str | Path, *, vocab_size: int = 320, text: str = TOKENIZER_TEXT) -> None:
    """Train a byte-level BPE tokenizer on `text` and write tokenizer.json and tokenizer_config.json."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    folder = Path(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False))


def without_weights(folder: str | Path, target: str | Path) -> Path:
    """Copy a model folder without its weight files: config and tokenizer only. Returns `target`."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns(*WEIGHT_FILES), dirs_exist_ok=True)
    return Path(target)


def random_prompts(lengths: Sequence[int], *, seed: int = 0, vocab_size: int = 320) -> list[list[int]]:
    """Token ids of one random prompt for each length, without special tokens."""
    import random

    generator = random.Random(seed)
    return [[generator.randrange(len(SPECIAL_TOKENS), vocab_size) for _ in range(length)] for length in lengths]


def load_hf(folder: str | Path) -> Any:
    """The transformers model of `folder`, in float32 with plain (eager) attention."""
    import torch
    from transformers import AutoConfig

    auto_class = _auto_class(AutoConfig.from_pretrained(folder))
    return auto_class.from_pretrained(folder, attn_implementation="eager").to(torch.float32).eval()


def hf_greedy(folder: str | Path, prompts: Sequence[Sequence[int]], n: int) -> list[list[int]]:
    """The `n` greedy token ids that follow each prompt; end-of-sequence tokens do not stop it.

    Every step computes the whole sequence anew: slow, but no cache can be wrong.
    """
    import torch

    model = load_hf(folder)
    outputs = []
    with torch.inference_mode():
        for prompt in prompts:
            ids = list(prompt)
            for _ in range(n):
                ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            outputs.append(ids[len(prompt) :])
    return outputs


def hf_hidden_states(folder: str | Path, prompts: Sequence[Sequence[int]]) -> list[Any]:
    """float32 [hidden_size] of each prompt: the last token's hidden state behind the final norm, not normalised."""
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, attn_implementation="eager").to(torch.float32).eval()
    with torch.inference_mode():
        return [model(torch.tensor([list(ids)]), use_cache=False).last_hidden_state[0, -1] for ids in prompts]


def hf_logprobs(folder: str | Path, sequences: Sequence[Sequence[int]]) -> list[Any]:
    """For each sequence the log-probabilities of the next token at each position: float32 [len, vocab_size]."""
    import torch

    model = load_hf(folder)
    with torch.inference_mode():
        return [model(torch.tensor([list(ids)]), use_cache=False).logits[0].log_softmax(-1) for ids in sequences]
