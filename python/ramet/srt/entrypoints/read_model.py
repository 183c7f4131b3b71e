"""Owns reading what is to be served, at a start: the model's config, checked against the flags, and its defaults."""

import logging
from typing import Any

from ramet.srt.configs.model_config import ModelConfig
from ramet.srt.configs.parallel_config import check_parallel_sizes
from ramet.srt.layers.attention.requirements import check_attention_backend
from ramet.srt.sampling.sampling_defaults import read_sampling_defaults
from ramet.srt.server_args import ServerArgs
from ramet.srt.utils.hub import resolve_model_path, resolve_tokenizer_path

logger = logging.getLogger(__name__)


def read_model(args: ServerArgs) -> tuple[ModelConfig, dict[str, Any]]:
    """The config, and the sampling parameters that requests take from the model. Logs what the files say in vain.

    Raises:
        ValueError: if the model folder or its config is wrong, or does not go with the flags.
    """
    check_attention_backend(args.attention_backend)
    folder = resolve_model_path(args.model_path, args.revision, weights=False)
    config = ModelConfig.from_path(
        folder,
        dtype=args.dtype,
        context_length=args.context_length,
        tokenizer_path=None if args.tokenizer_path is None else resolve_tokenizer_path(args.tokenizer_path, "", None),
        is_embedding=args.is_embedding,
        kv_cache_dtype=args.kv_cache_dtype,
    )
    check_parallel_sizes(
        config,
        tp_size=args.tp_size,
        pp_size=args.pp_size,
        ep_size=args.ep_size,
        attn_dp_size=args.attn_dp_size,
    )
    if idle := config.idle_window_keys:
        architecture = config.architecture
        logger.warning("no effect in a %s, as in transformers: %s of config.json", architecture, ", ".join(idle))
    embedding = config.embedding
    if embedding is not None and embedding.default_prompt is not None:
        logger.warning(
            "config_sentence_transformers.json names a default prompt, %r, which sentence-transformers puts before "
            "each text: here clients write it themselves",
            embedding.default_prompt,
        )
    rope = config.rope
    if rope.ignored_theta is not None:
        logger.warning(
            "rope_theta is %g, as in transformers: rope_scaling of config.json stands in place of rope_parameters "
            "and its rope_theta %g; write it into rope_scaling if that is meant",
            rope.theta,
            rope.ignored_theta,
        )
    defaults = read_sampling_defaults(folder, config.vocab_size) if args.sampling_defaults == "model" else {}
    return config, defaults
