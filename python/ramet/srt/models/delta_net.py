"""Owns a linear decoder layer's first half: the projections around a gated delta net, and how its heads are split."""

import torch

from ramet.srt.batch.forward_batch_info import ForwardBatch
from ramet.srt.configs.model_config import ModelConfig
from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.layers.attention.gated_delta import GatedDelta
from ramet.srt.layers.linear import MergedColumnParallelLinear, RowParallelLinear, SlicedColumnParallelLinear
from ramet.srt.layers.rotary_embedding import Rotation
from ramet.srt.models.attention_block import AttentionBlock


class DeltaNet(AttentionBlock):
    """A gated delta net. Key heads are split over ranks, each with its value heads.

    Args:
        parallel: how attention layers are split.
        place: of the layer among the linear ones of the rank.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, parallel: ParallelConfig, place: int, prefix: str):
        super().__init__()
        traits, hidden_size = config.traits.delta, config.hidden_size
        assert traits is not None, "such layers are made where the config describes them"
        keys, values = traits.num_key_heads * traits.key_dim, traits.num_value_heads * traits.value_dim
        heads = traits.num_value_heads
        self.in_proj: MergedColumnParallelLinear
        self.in_proj_ba: MergedColumnParallelLinear
        if traits.is_by_key_head:
            sizes = {"in_proj_qkvz": 2 * (keys + values), "in_proj_ba": 2 * heads}
            self.in_proj, self.in_proj_ba = (
                MergedColumnParallelLinear(
                    hidden_size, [f"{prefix}.{name}"], [size], bias=False, dtype=dtype, parallel=parallel
                )
                for name, size in sizes.items()
            )
        else:
            parts = {f"{prefix}.in_proj_qkv": (keys, keys, values), f"{prefix}.in_proj_z": (values,)}
            self.in_proj = SlicedColumnParallelLinear(hidden_size, parts, dtype=dtype, parallel=parallel)
            names = [f"{prefix}.in_proj_{part}" for part in "ba"]
            self.in_proj_ba = MergedColumnParallelLinear(
                hidden_size, names, [heads, heads], bias=False, dtype=dtype, parallel=parallel
            )
        self.delta = GatedDelta(
            traits, prefix, eps=config.traits.rms_norm_eps, place=place, dtype=dtype, parallel=parallel
        )
        self.o_proj = RowParallelLinear(
            values, hidden_size, f"{prefix}.out_proj", bias=False, dtype=dtype, parallel=parallel
        )

    def _attend(self, x: torch.Tensor, _rotary: Rotation | None, forward_batch: ForwardBatch) -> torch.Tensor:
        """[num_tokens, hidden_size] -> [num_tokens, columns of o_proj]."""
        return self.delta(self.in_proj(x), self.in_proj_ba(x), forward_batch)
