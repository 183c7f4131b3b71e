"""Owns the kernel that chooses each token's experts and their weights from the router's logits."""

import torch
import triton
import triton.language as tl

from ramet.srt.configs.moe_config import MoeConfig
from ramet.srt.layers.kernels.runtime import can_launch_early, next_power_of_2

LOWEST = tl.constexpr(-(1 << 63))  # less than every key


@triton.jit
def _make_keys(values, places):
    """int64 that are ordered as the float32 `values` are, NaN highest; of equal values the lowest place goes first."""
    bits = tl.where(values == 0.0, 0.0, values).to(tl.int32, bitcast=True)  # one zero, not two
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (bits.to(tl.int64) << 32) | (0x7FFFFFFF - places).to(tl.int64)


@triton.jit
def _values_of(keys):
    bits = (keys >> 32).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _keep_best_groups(keys, NUM_GROUPS: tl.constexpr, NUM_KEPT: tl.constexpr, BLOCK_GROUPS: tl.constexpr):
    """The keys [BLOCK_GROUPS, places], LOWEST but in the groups whose two highest values sum to the most."""
    first = tl.max(keys, axis=1)
    second = tl.max(tl.where(keys == first[:, None], LOWEST, keys), axis=1)
    groups = tl.arange(0, BLOCK_GROUPS)
    group_keys = _make_keys(_values_of(first) + _values_of(second), groups)
    group_keys = tl.where(groups < NUM_GROUPS, group_keys, LOWEST)
    is_kept = groups < 0
    for _ in range(NUM_KEPT):
        is_best = group_keys == tl.max(group_keys, axis=0)
        is_kept = is_kept | is_best
        group_keys = tl.where(is_best, LOWEST, group_keys)
    return tl.where(is_kept[:, None], keys, LOWEST)


@triton.jit
def _route_kernel(
    logits_ptr,
    bias_ptr,
    weights_ptr,
    ids_ptr,
    scaling_factor,
    TOP_K: tl.constexpr,
    SCORING: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    NUM_KEPT: tl.constexpr,
    NORMALISES: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program routes one token. Its experts lie in a tile of [groups, places in a group]."""
    token = tl.program_id(0).to(tl.int64)
    groups, places = tl.arange(0, BLOCK_GROUPS)[:, None], tl.arange(0, BLOCK_SIZE)[None, :]
    experts = groups * GROUP_SIZE + places
    mask = (groups < NUM_GROUPS) & (places < GROUP_SIZE)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + experts, mask=mask, other=0.0)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    logits_ptrs = logits_ptr + token * (NUM_GROUPS * GROUP_SIZE) + experts
    logits = tl.load(logits_ptrs, mask=mask, other=float("-inf")).to(tl.float32)
    if SCORING == "softmax":
        scores = tl.exp(logits - tl.max(tl.max(logits, axis=1), axis=0))
        scores /= tl.sum(tl.sum(scores, axis=1), axis=0)
    else:
        tl.static_assert(SCORING == "sigmoid")
        scores = 1.0 / (1.0 + tl.exp(-logits))
    ranks = scores
    if HAS_BIAS:
        ranks += bias
    keys = tl.where(mask, _make_keys(ranks, experts), LOWEST)
    if NUM_GROUPS > 1:
        keys = _keep_best_groups(keys, NUM_GROUPS, NUM_KEPT, BLOCK_GROUPS)
    slots = tl.arange(0, BLOCK_K)
    weights = tl.zeros([BLOCK_K], tl.float32)
    ids = tl.zeros([BLOCK_K], tl.int32)
    for slot in range(TOP_K):
        best = tl.max(tl.max(keys, axis=1), axis=0)
        is_best = keys == best
        weight = _values_of(best)
        if HAS_BIAS:
            weight = tl.sum(tl.sum(tl.where(is_best, scores, 0.0), axis=1), axis=0)
        weights = tl.where(slots == slot, weight, weights)
        ids = tl.where(slots == slot, 0x7FFFFFFF - (best & 0x7FFFFFFF).to(tl.int32), ids)
        keys = tl.where(is_best, LOWEST, keys)
    if NORMALISES:
        weights /= tl.sum(weights, axis=0)
    weights *= scaling_factor
    tl.store(weights_ptr + token * TOP_K + slots, weights, mask=slots < TOP_K)
    tl.store(ids_ptr + token * TOP_K + slots, ids, mask=slots < TOP_K)


def route(logits: torch.Tensor, bias: torch.Tensor | None, moe: MoeConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """What TopKRouter makes of its logits; where scores are equal, the experts with the lowest numbers are chosen.

    Args:
        logits: contiguous [num_tokens, num_experts]; any floating-point type.
        bias: float32 [num_experts], added to the scores by which experts are chosen.

    Returns:
        Weights float32 and expert ids int32, both [num_tokens, top_k], the experts that rank highest first.
    """
    num_tokens, top_k = logits.shape[0], moe.num_experts_per_tok
    assert logits.shape[1] == moe.num_experts and logits.is_contiguous()
    weights = torch.empty((num_tokens, top_k), dtype=torch.float32, device=logits.device)
    ids = torch.empty((num_tokens, top_k), dtype=torch.int32, device=logits.device)
    if num_tokens == 0:
        return weights, ids
    early = can_launch_early(logits.device)
    group_size = moe.num_experts // moe.num_groups
    _route_kernel[(num_tokens,)](
        logits,
        logits if bias is None else bias,
        weights,
        ids,
        float(moe.scaling_factor),
        TOP_K=top_k,
        SCORING=moe.traits.scoring,
        HAS_BIAS=bias is not None,
        NUM_GROUPS=moe.num_groups,
        GROUP_SIZE=group_size,
        NUM_KEPT=moe.num_kept_groups,
        NORMALISES=moe.norm_topk_prob,
        BLOCK_GROUPS=next_power_of_2(moe.num_groups),
        BLOCK_SIZE=next_power_of_2(group_size),
        BLOCK_K=next_power_of_2(top_k),
        EARLY=early,
        num_warps=1,
        **({"launch_pdl": True} if early else {}),
    )
    return weights, ids
