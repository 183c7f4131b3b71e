"""Owns the list of config keys that change nothing in what a model computes, some of them only at certain values.

A key that nobody reads and that this list doesn't have is refused: it may stand for a trait that Ramet lacks.
"""

import json
from collections.abc import Mapping
from typing import Any

SHOWN = 12  # unknown keys in one message
ANY = object()  # in place of the allowed values: whatever the key holds is harmless

_METADATA = (
    "_name_or_path name_or_path _commit_hash transformers_version auto_map custom_pipelines license model_name "
    "tokenizer_class processor_class task_specific_params finetuning_task problem_type prefix unsloth_fixed "
    "unsloth_version is_llama_config output_past xla_device padding_side id2label label2id num_labels _num_labels "
    "transformers.js_config"
)
_TOKENS = (
    "bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id cls_token_id mask_token_id "
    "decoder_start_token_id"
)  # the end tokens are read where generation_config.json is
_TRAINING = (
    "initializer_range attention_dropout hidden_dropout attn_pdrop resid_pdrop embd_pdrop hidden_dropout_prob "
    "attention_probs_dropout_prob dropout dropout_rate embedding_dropout residual_dropout classifier_dropout "
    "router_aux_loss_coef router_z_loss_coef router_jitter_noise aux_loss_alpha seq_aux gradient_checkpointing "
    "neftune_noise_alpha use_bfloat16 loss_type"
)
# How a program computes or what it gives back, not what it computes; `pretraining_tp` is a number of slices.
_RUNNING = (
    "use_cache pretraining_tp output_router_logits output_attentions output_hidden_states return_dict use_return_dict "
    "torchscript tf_legacy_loss attn_implementation _attn_implementation _attn_implementation_autoset "
    "_attn_implementation_internal experts_implementation _experts_implementation _experts_implementation_internal "
    "_flash_attn_2_enabled use_flash_attn use_flashattn use_flash_attention use_flash_attention_2 ep_size "
    "tie_last_hidden_states"
)
# Limits of tokenizers and training runs. The model's own is `max_position_embeddings`.
_LENGTHS = "model_max_length max_sequence_length max_seq_length max_seq_len seq_length"
# Older configs hold sampling defaults; transformers drops them there, and generation_config.json counts.
_GENERATION = (
    "max_length max_new_tokens min_length min_new_tokens do_sample early_stopping num_beams num_beam_groups "
    "diversity_penalty temperature top_k top_p min_p typical_p epsilon_cutoff eta_cutoff repetition_penalty "
    "encoder_repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids "
    "num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id "
    "remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens "
    "num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold assistant_lookbehind "
    "target_lookbehind"
)
# The classes of Llama, Mixtral and others have no windows, or fewer keys for them, and look at none of these.
_WINDOWS = "sliding_window use_sliding_window max_window_layers"

# Traits that other families have, at the values that say "not here". None stands where null does.
_ABSENT_TRAITS: dict[str, tuple[Any, ...]] = {
    "is_causal": (True,),  # null turns the mask off, too
    "is_decoder": (True, False, None),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "tie_encoder_decoder": (False, None),
    "chunk_size_feed_forward": (0, None),
    "pruned_heads": ({}, None),
    "per_layer_config": ({}, None),
    "attention_bias": (False, None),
    "activation": ("swiglu", None),  # beside `hidden_act`: the gated form that all families here have
    "qkv_bias": (False, None),
    "use_qkv_bias": (False, None),
    "mlp_bias": (False, None),
    "use_bias": (False, None),
    "use_qk_norm": (False, None),
    "qk_norm": (False, None),
    "attn_output_gate": (False, None),
    "use_mrope": (False, None),
    "alibi": (False, None),
    "partial_rotary_factor": (1, None),
    "rotary_pct": (1, None),
    "rope_interleaved": (False, None),
    "rope_interleave": (False, None),
    "num_experts": (0, None),
    "num_local_experts": (0, None),
    "n_routed_experts": (0, None),
    "n_shared_experts": (0, None),
    "num_shared_experts": (0, None),
    "shared_expert_intermediate_size": (0, None),
    "mlp_only_layers": ([], None),
    "decoder_sparse_step": (1, None),
    "first_k_dense_replace": (0, None),
    "moe_layer_freq": (1, None),
    "n_group": (1, None),
    "topk_group": (1, None),
    "routed_scaling_factor": (1, None),
    "num_nextn_predict_layers": (0, None),
    "embedding_multiplier": (1, None),
    "residual_multiplier": (1, None),
    "logits_scaling": (1, None),
    "no_rope_layers": ([], None),
}

HARMLESS_KEYS: Mapping[str, Any] = {
    **dict.fromkeys(" ".join((_METADATA, _TOKENS, _TRAINING, _RUNNING, _LENGTHS, _GENERATION, _WINDOWS)).split(), ANY),
    **_ABSENT_TRAITS,
    "quantization_config": ANY,  # read by quantization_config.py, as is the next
    "compression_config": ANY,
}


def objections(unread: Mapping[str, Any], harmless: Mapping[str, Any]) -> list[str]:
    """Why these keys can't stay unread; empty if all of them are harmless.

    A null in a key that isn't known passes: config classes write it for what a model doesn't have. A false doesn't,
    as it may turn off what every other model has.
    """
    reasons = []
    unknown = []
    for name, value in unread.items():
        if name not in harmless:
            if value is not None:
                unknown.append(f"{short(name)} ({short(value)})")
        elif harmless[name] is not ANY and not any(_same(value, choice) for choice in harmless[name]):
            choices = " or ".join(json.dumps(choice) for choice in harmless[name])
            reasons.append(f"{name!r} is supported only as {choices}; got {short(value)}")
    if unknown:
        names = ", ".join(unknown[:SHOWN]) + (f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else "")
        reasons.append(
            f"{names}: not known for this architecture, and may change what the model computes; "
            "take out of the file what doesn't"
        )
    return reasons


def short(value: Any) -> str:
    """A config's value as an error message shows it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _same(value: Any, choice: Any) -> bool:
    """Equal, but true is not 1."""
    return isinstance(value, bool) == isinstance(choice, bool) and value == choice
