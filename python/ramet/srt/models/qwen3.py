"""Owns what Qwen3's dense models add to the decoder: norms on the heads of q and k."""

from ramet.srt.models.llama import LlamaForCausalLM


class Qwen3ForCausalLM(LlamaForCausalLM):
    """Llama whose queries and keys are normalised per head before the rotation."""

    has_qk_norm = True
