"""Owns what Qwen3's mixture-of-experts models add to its dense ones: experts in some or all layers."""

from torch import nn

from ramet.srt.layers.moe import SparseMoeBlock
from ramet.srt.models.qwen3 import Qwen3ForCausalLM


class Qwen3MoeForCausalLM(Qwen3ForCausalLM):
    """Qwen3 whose sparse layers have experts in place of the MLP."""

    def make_mlp(self, layer_id: int) -> nn.Module:
        assert self.config.moe is not None
        if not self.config.moe.sparse_layers[layer_id]:
            return super().make_mlp(layer_id)
        names = ("gate_proj", "up_proj", "down_proj")
        return SparseMoeBlock(self.config, self.mlp_prefix(layer_id), names, self.dtype, self.parallel)
