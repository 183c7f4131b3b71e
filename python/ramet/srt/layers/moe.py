"""Owns the mixture-of-experts layer: the router, the stacked expert weights and how they are sharded over ranks."""

import torch
import torch.nn.functional as F
from torch import nn

from ramet.srt.configs.model_config import ModelConfig
from ramet.srt.configs.moe_config import MoeConfig
from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.distributed.communication_op import tensor_model_parallel_all_reduce
from ramet.srt.layers.activation import get_activation
from ramet.srt.layers.fused_experts import BiasedGate, Gate, SharedOutput, fused_experts, needs_host
from ramet.srt.layers.kernels.runtime import use_kernels
from ramet.srt.layers.matmul import project
from ramet.srt.layers.mlp import GatedMLP
from ramet.srt.layers.parameter import declare_weight, shard_box
from ramet.srt.layers.quantization.weight import weight_of
from ramet.srt.weights.manifest import WeightBox

GATE, UP, DOWN = range(3)  # places in ExpertTraits.names


class SparseMoeBlock(nn.Module):
    """In place of a decoder layer's MLP: each token goes through the few experts that the router chooses.

    With a shared expert, through that one, too.

    Args:
        prefix: of the block in the checkpoint.
    """

    def __init__(self, config: ModelConfig, prefix: str, dtype: torch.dtype, parallel: ParallelConfig):
        super().__init__()
        moe = config.moe
        assert moe is not None, "the config of an architecture with experts describes them"
        self.gate = TopKRouter(config.hidden_size, moe, prefix, dtype=dtype)
        self.experts = FusedMoE(
            config.hidden_size,
            moe,
            f"{prefix}.experts",
            activation=config.traits.hidden_act,
            dtype=dtype,
            parallel=parallel,
        )
        self.traits = moe.traits
        self.has_shared = moe.shared_intermediate_size > 0
        if self.has_shared:
            shared = GatedMLP(
                config.hidden_size,
                moe.shared_intermediate_size,
                f"{prefix}.{self.traits.shared}",
                bias=False,
                activation=config.traits.hidden_act,
                dtype=dtype,
                parallel=parallel,
            )
            self.add_module(self.traits.shared, shared)
        if self.has_shared and self.traits.shared_gate:
            name = self.traits.shared_gate
            self.add_module(name, SharedExpertGate(config.hidden_size, f"{prefix}.{name}", dtype))
        self.tp_size = parallel.tp_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[num_tokens, hidden_size] -> [num_tokens, hidden_size], the same on every rank."""
        y = self.partial(x)
        return y if self.tp_size == 1 else tensor_model_parallel_all_reduce(y)

    def partial(self, x: torch.Tensor) -> torch.Tensor:
        """[num_tokens, hidden_size] -> [num_tokens, hidden_size]: what this rank adds to the sum."""
        shared = None
        if self.has_shared:
            gate = getattr(self, self.traits.shared_gate)(x) if self.traits.shared_gate else None
            shared = SharedOutput(getattr(self, self.traits.shared).partial(x), gate)
        return self.experts(x, *self.gate(x), shared)


class SharedExpertGate(nn.Module):
    """How much of the shared expert's output a token takes, as a logit. The same on every rank."""

    def __init__(self, hidden_size: int, name: str, dtype: torch.dtype):
        super().__init__()
        shape = (1, hidden_size)
        self.weight = declare_weight(shape, dtype, [shard_box(f"{name}.weight", shape, 0, 0, 1)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[num_tokens, hidden_size] -> [num_tokens, 1]; the share is its sigmoid."""
        return project(x, self.weight) if use_kernels(x) else F.linear(x, self.weight)


class TopKRouter(nn.Module):
    """Chooses each token's experts and their weights. The same on every rank.

    Args:
        prefix: of the block in the checkpoint.
    """

    def __init__(self, hidden_size: int, moe: MoeConfig, prefix: str, *, dtype: torch.dtype):
        super().__init__()
        traits = moe.traits
        shape = (moe.num_experts, hidden_size)
        name = f"{prefix}.{traits.router}"
        box = shard_box(f"{name}.weight", shape, 0, 0, moe.num_experts)
        self.weight = declare_weight(shape, torch.float32 if traits.is_router_float32 else dtype, [box])
        self.bias: nn.Parameter | None = None  # of the logits
        if traits.has_biases:
            box = shard_box(f"{name}.bias", shape[:1], 0, 0, moe.num_experts)
            self.bias = declare_weight(shape[:1], self.weight.dtype, [box])
        # Of the scores by which experts are chosen; not of their weights.
        self.e_score_correction_bias: nn.Parameter | None = None
        if traits.correction_bias:
            box = shard_box(f"{prefix}.{traits.correction_bias}", shape[:1], 0, 0, moe.num_experts)
            self.e_score_correction_bias = declare_weight(shape[:1], torch.float32, [box])
        self.moe = moe

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[num_tokens, hidden_size] -> weights float32 and expert ids int64 or int32, both [num_tokens, top_k].

        Scores are over all experts, in float32.
        """
        moe = self.moe
        if use_kernels(x):
            from ramet.srt.layers.kernels.router import route

            logits = project(x.to(self.weight.dtype), self.weight, self.bias)
            return route(logits, self.e_score_correction_bias, moe)
        logits = F.linear(x.to(self.weight.dtype), self.weight, self.bias)
        if moe.traits.scoring == "softmax":
            scores = logits.softmax(dim=-1, dtype=torch.float32)
        else:
            scores = logits.float().sigmoid()
        bias = self.e_score_correction_bias
        if bias is None and moe.num_groups == 1:
            weights, expert_ids = scores.topk(moe.num_experts_per_tok, dim=-1)
        else:
            expert_ids = self._choose(scores if bias is None else scores + bias)
            weights = scores.gather(1, expert_ids)
        if moe.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        if moe.scaling_factor != 1:
            weights = weights * moe.scaling_factor
        return weights, expert_ids

    def _choose(self, ranks: torch.Tensor) -> torch.Tensor:
        """The experts that rank highest, in the groups whose two highest sum to the most (DeepSeek-V3, 2024)."""
        moe = self.moe
        if moe.num_groups > 1:
            groups = ranks.unflatten(-1, (moe.num_groups, -1))
            best = groups.topk(2, dim=-1).values.sum(-1).topk(moe.num_kept_groups, dim=-1).indices
            is_dropped = torch.ones(groups.shape[:-1], dtype=torch.bool, device=ranks.device).scatter_(1, best, False)
            ranks = groups.masked_fill(is_dropped.unsqueeze(-1), float("-inf")).flatten(1)
        return ranks.topk(moe.num_experts_per_tok, dim=-1).indices


class FusedMoE(nn.Module):
    """All experts of a layer that this rank has, stacked: sum over a token's experts of weight * down(act(gate) * up).

    Whole experts are split over the expert-parallel ranks, and an expert's intermediate dimension over the ranks
    that share it (with ep_size 1, the whole tensor-parallel group). Each rank gives its part of the sum.

    Args:
        prefix: of the experts in the checkpoint, which has a matrix of its own for each of them, or stacks.
    """

    quantisable_weights = ("w13_weight", "w2_weight")

    def __init__(
        self,
        hidden_size: int,
        moe: MoeConfig,
        prefix: str,
        *,
        activation: str,
        dtype: torch.dtype,
        parallel: ParallelConfig,
    ):
        super().__init__()
        moe.check_split(parallel.tp_size, parallel.ep_size)
        self.num_local_experts = moe.num_experts // parallel.ep_size
        self.first_expert = parallel.ep_rank * self.num_local_experts
        self.activation = get_activation(activation)
        size = moe.intermediate_size // parallel.moe_tp_size  # of this rank
        start = parallel.moe_tp_rank * size
        self.clamp = moe.clamped_gate
        self.w13_bias: nn.Parameter | None = None  # [num_local_experts, rows of w13_weight]
        self.w2_bias: nn.Parameter | None = None  # [num_local_experts, hidden_size]
        self.adds_w2_bias = parallel.moe_tp_rank == 0  # of the ranks that share an expert
        declare = self._declare_stacks if moe.traits.is_stacked else self._declare_matrices
        declare(hidden_size, moe, prefix, (start, start + size), dtype)

    def _declare_matrices(
        self, hidden_size: int, moe: MoeConfig, prefix: str, part: tuple[int, int], dtype: torch.dtype
    ) -> None:
        """From a matrix for each expert. `part` are this rank's rows of W1 and W3, and columns of W2."""
        start, stop = part
        size = stop - start
        w13_boxes: list[WeightBox] = []
        w2_boxes: list[WeightBox] = []
        for place in range(self.num_local_experts):
            expert = f"{prefix}.{self.first_expert + place}"
            rows = (moe.intermediate_size, hidden_size)
            for matrix, row in ((GATE, 0), (UP, size)):
                box = shard_box(f"{expert}.{moe.traits.names[matrix]}.weight", rows, 0, start, stop, row)
                w13_boxes.append(_stack(box, place))
            columns = (hidden_size, moe.intermediate_size)
            box = shard_box(f"{expert}.{moe.traits.names[DOWN]}.weight", columns, 1, start, stop)
            w2_boxes.append(_stack(box, place))
        # [num_local_experts, gate rows then up rows of this rank, hidden_size]
        self.w13_weight = declare_weight((self.num_local_experts, 2 * size, hidden_size), dtype, w13_boxes)
        # [num_local_experts, hidden_size, columns of this rank]
        self.w2_weight = declare_weight(
            (self.num_local_experts, hidden_size, size), dtype, w2_boxes, all_columns=moe.intermediate_size
        )

    def _declare_stacks(
        self, hidden_size: int, moe: MoeConfig, prefix: str, part: tuple[int, int], dtype: torch.dtype
    ) -> None:
        """From all experts' matrices in one tensor, with rows of W1 and W3 in turns, and their biases."""
        start, stop = part
        stack = (self.first_expert, self.first_expert + self.num_local_experts)

        def declare(name: str, *ranges: tuple[int, int], all_columns: int | None = None) -> nn.Parameter:
            shape = [last - first for first, last in (stack, *ranges)]
            box = WeightBox(f"{prefix}.{name}", (stack, *ranges), tuple((0, extent) for extent in shape))
            return declare_weight(shape, dtype, [box], all_columns=all_columns)

        rows, hidden = (2 * start, 2 * stop), (0, hidden_size)
        self.w13_weight = declare("gate_up_proj", rows, hidden)
        self.w2_weight = declare("down_proj", hidden, part, all_columns=moe.intermediate_size)
        self.w13_bias, self.w2_bias = declare("gate_up_proj_bias", rows), declare("down_proj_bias", hidden)

    @property
    def gate(self) -> Gate:
        """What is between the two products, and behind them."""
        if self.clamp is None:
            return self.activation
        assert self.w13_bias is not None
        return BiasedGate(self.clamp, self.w13_bias, self.w2_bias if self.adds_w2_bias else None)

    def needs_host(self, dtype: torch.dtype) -> bool:
        """Whether no CUDA graph can hold `forward` of x in `dtype`; known once the weights have a device."""
        return needs_host(dtype, weight_of(self, "w13_weight"), weight_of(self, "w2_weight"))

    def forward(
        self, x: torch.Tensor, weights: torch.Tensor, expert_ids: torch.Tensor, shared: SharedOutput | None = None
    ) -> torch.Tensor:
        """[num_tokens, hidden_size] -> [num_tokens, hidden_size]: what this rank adds to the sum.

        Args:
            weights, expert_ids: [num_tokens, top_k], of all experts and equal on every rank.
            shared: of this rank; is in the sum.
        """
        return fused_experts(
            x,
            weight_of(self, "w13_weight"),
            weight_of(self, "w2_weight"),
            weights,
            expert_ids,
            self.gate,
            first_expert=self.first_expert,
            shared=shared,
        )


def _stack(box: WeightBox, place: int) -> WeightBox:
    """The box with its target as one layer of a stack."""
    return WeightBox(box.checkpoint_name, box.source, ((place, place + 1), *box.target))
