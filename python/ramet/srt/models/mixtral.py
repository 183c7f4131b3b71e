"""Owns what Mixtral adds to Mistral: experts in every layer, under names of their own."""

from torch import nn

from ramet.srt.layers.moe import SparseMoeBlock
from ramet.srt.models.llama import MistralForCausalLM


class MixtralForCausalLM(MistralForCausalLM):
    """Mistral with experts in place of the MLP."""

    mlp_name = "block_sparse_moe"

    def make_mlp(self, layer_id: int) -> nn.Module:
        names = ("w1", "w3", "w2")  # gate, up, down
        return SparseMoeBlock(self.config, self.mlp_prefix(layer_id), names, self.dtype, self.parallel)
