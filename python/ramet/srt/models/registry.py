"""Owns the map from the architecture that a config names to the class that builds it."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ramet.srt.models.llama import LlamaForCausalLM

_MODELS = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "MixtralForCausalLM": "mixtral",
    "Qwen2ForCausalLM": "llama",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}


def get_model_class(architecture: str) -> "type[LlamaForCausalLM]":
    """The model class for `architecture`.

    Raises:
        ValueError: if it is not supported; the message lists those that are.
    """
    if architecture not in _MODELS:
        raise ValueError(f"architecture {architecture!r} is not supported; supported are {', '.join(sorted(_MODELS))}")
    module = importlib.import_module(f"ramet.srt.models.{_MODELS[architecture]}")
    return getattr(module, architecture)
