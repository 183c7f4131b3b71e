"""Owns the mixture-of-experts layer: the router, the stacked expert weights and how they are sharded over ranks."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ramet.srt.configs.model_config import ModelConfig
from ramet.srt.configs.moe_config import MoeConfig
from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.distributed.communication_op import tensor_model_parallel_all_reduce
from ramet.srt.layers.activation import get_activation
from ramet.srt.layers.fused_experts import fused_experts, needs_host
from ramet.srt.layers.parameter import declare_weight, shard_box
from ramet.srt.layers.quantization.weight import weight_of
from ramet.srt.weights.manifest import WeightBox

GATE, UP, DOWN = range(3)  # places in the names of an expert's matrices


class SparseMoeBlock(nn.Module):
    """In place of a decoder layer's MLP: each token goes through the few experts that the router chooses.

    Args:
        prefix: of the block in the checkpoint.
        expert_names: what the checkpoint calls an expert's gate, up and down matrices.
    """

    def __init__(
        self,
        config: ModelConfig,
        prefix: str,
        expert_names: Sequence[str],
        dtype: torch.dtype,
        parallel: ParallelConfig,
    ):
        super().__init__()
        assert config.moe is not None, "the config of an architecture with experts describes them"
        self.gate = TopKRouter(config.hidden_size, config.moe, f"{prefix}.gate", dtype=dtype)
        self.experts = FusedMoE(
            config.hidden_size,
            config.moe,
            f"{prefix}.experts",
            expert_names,
            activation=config.hidden_act,
            dtype=dtype,
            parallel=parallel,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[num_tokens, hidden_size] -> [num_tokens, hidden_size]."""
        return self.experts(x, *self.gate(x))


class TopKRouter(nn.Module):
    """Chooses each token's experts and their weights. The same on every rank."""

    def __init__(self, hidden_size: int, moe: MoeConfig, name: str, *, dtype: torch.dtype):
        super().__init__()
        shape = (moe.num_experts, hidden_size)
        self.weight = declare_weight(shape, dtype, [shard_box(f"{name}.weight", shape, 0, 0, moe.num_experts)])
        self.top_k = moe.num_experts_per_tok
        self.norm_topk_prob = moe.norm_topk_prob

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[num_tokens, hidden_size] -> weights float32 and expert ids int64, both [num_tokens, top_k].

        The softmax is over all experts, in float32.
        """
        probs = F.linear(x, self.weight).softmax(dim=-1, dtype=torch.float32)
        weights, expert_ids = probs.topk(self.top_k, dim=-1)
        if self.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights, expert_ids


class FusedMoE(nn.Module):
    """All experts of a layer that this rank has, stacked: sum over a token's experts of weight * down(act(gate) * up).

    Whole experts are split over the expert-parallel ranks, and an expert's intermediate dimension over the ranks
    that share it (with ep_size 1, the whole tensor-parallel group). The partial results are summed over that group.

    Args:
        prefix: of the experts in the checkpoint, which has a matrix of its own for each of them.
        expert_names: what the checkpoint calls an expert's gate, up and down matrices.
    """

    quantisable_weights = ("w13_weight", "w2_weight")

    def __init__(
        self,
        hidden_size: int,
        moe: MoeConfig,
        prefix: str,
        expert_names: Sequence[str],
        *,
        activation: str,
        dtype: torch.dtype,
        parallel: ParallelConfig,
    ):
        super().__init__()
        moe.check_split(parallel.tp_size, parallel.ep_size)
        self.num_local_experts = moe.num_experts // parallel.ep_size
        self.first_expert = parallel.ep_rank * self.num_local_experts
        self.tp_size = parallel.tp_size
        self.activation = get_activation(activation)
        size = moe.intermediate_size // parallel.moe_tp_size  # of this rank
        start = parallel.moe_tp_rank * size
        w13_boxes: list[WeightBox] = []
        w2_boxes: list[WeightBox] = []
        for place in range(self.num_local_experts):
            expert = f"{prefix}.{self.first_expert + place}"
            rows = (moe.intermediate_size, hidden_size)
            for part, row in ((GATE, 0), (UP, size)):
                box = shard_box(f"{expert}.{expert_names[part]}.weight", rows, 0, start, start + size, row)
                w13_boxes.append(_stack(box, place))
            columns = (hidden_size, moe.intermediate_size)
            box = shard_box(f"{expert}.{expert_names[DOWN]}.weight", columns, 1, start, start + size)
            w2_boxes.append(_stack(box, place))
        # [num_local_experts, gate rows then up rows of this rank, hidden_size]
        self.w13_weight = declare_weight((self.num_local_experts, 2 * size, hidden_size), dtype, w13_boxes)
        # [num_local_experts, hidden_size, columns of this rank]
        self.w2_weight = declare_weight(
            (self.num_local_experts, hidden_size, size), dtype, w2_boxes, all_columns=moe.intermediate_size
        )

    def needs_host(self, dtype: torch.dtype) -> bool:
        """Whether no CUDA graph can hold `forward` of x in `dtype`; known once the weights have a device."""
        return needs_host(dtype, weight_of(self, "w13_weight"), weight_of(self, "w2_weight"))

    def forward(self, x: torch.Tensor, weights: torch.Tensor, expert_ids: torch.Tensor) -> torch.Tensor:
        """[num_tokens, hidden_size] -> [num_tokens, hidden_size], the same on every rank.

        Args:
            weights, expert_ids: [num_tokens, top_k], of all experts and equal on every rank.
        """
        y = fused_experts(
            x,
            weight_of(self, "w13_weight"),
            weight_of(self, "w2_weight"),
            weights,
            expert_ids - self.first_expert,
            self.activation,
        )
        return y if self.tp_size == 1 else tensor_model_parallel_all_reduce(y)


def _stack(box: WeightBox, place: int) -> WeightBox:
    """The box with its target as one layer of a stack."""
    return WeightBox(box.checkpoint_name, box.source, ((place, place + 1), *box.target))
