"""Owns the kernels of the gated activations: act(first half) * second half, and gpt-oss's clamped one."""

import torch
import triton
import triton.language as tl

from ramet.srt.configs.moe_config import ClampedGate
from ramet.srt.layers.kernels.runtime import can_launch_early, next_power_of_2

BLOCK = 1024
NAMES = ("silu", "swish", "gelu", "gelu_pytorch_tanh", "relu")


@triton.jit
def activate(x, NAME: tl.constexpr):
    """The activation of float32 values."""
    if NAME == "silu" or NAME == "swish":
        y = x / (1.0 + tl.exp(-x))
    elif NAME == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_pytorch_tanh":
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        y = x * (1.0 - 1.0 / (1.0 + tl.exp(2.0 * inner)))
    else:
        tl.static_assert(NAME == "relu")
        y = tl.maximum(x, 0.0)
    return y


@triton.jit
def _act_and_mul_kernel(x_ptr, out_ptr, x_stride, size, NAME: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < size
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    gate = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * x_stride + size + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * size + columns, (activate(gate, NAME) * up).to(out_ptr.dtype.element_ty), mask=mask)


def act_and_mul(x: torch.Tensor, name: str) -> torch.Tensor:
    """[num_rows, 2 * size], rows contiguous in themselves -> a new [num_rows, size]; `name` is one of NAMES."""
    num_rows, size = x.shape[0], x.shape[1] // 2
    out = torch.empty((num_rows, size), dtype=x.dtype, device=x.device)
    if num_rows == 0:
        return out
    early = can_launch_early(x.device)
    _act_and_mul_kernel[(num_rows, triton.cdiv(size, BLOCK))](
        x, out, x.stride(0), size, NAME=name, BLOCK=BLOCK, EARLY=early, **({"launch_pdl": True} if early else {})
    )
    return out


@triton.jit
def _clamped_gate_kernel(
    y_ptr,
    bias_ptr,
    ends_ptr,
    ids_ptr,
    out_ptr,
    num_experts,
    first_expert,
    size,
    alpha,
    limit,
    HAS_IDS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program takes BLOCK pairs of one row: of the expert that ids say, or the first whose rows end behind it."""
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    experts = tl.arange(0, BLOCK_EXPERTS)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if HAS_IDS:
        expert = tl.load(ids_ptr + row).to(tl.int32) - first_expert
    else:
        ends = tl.load(ends_ptr + experts, mask=experts < num_experts, other=0)
        expert = tl.sum(((experts < num_experts) & (ends <= row)).to(tl.int32), axis=0)
    is_here = (expert >= 0) & (expert < num_experts)
    mask = columns < tl.where(is_here, size, 0)
    pairs = 2 * columns[:, None] + tl.arange(0, 2)[None, :]
    y = tl.load(y_ptr + row.to(tl.int64) * 2 * size + pairs, mask=mask[:, None], other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + expert.to(tl.int64) * 2 * size + pairs, mask=mask[:, None], other=0.0)
    gate, up = tl.split(y + bias.to(tl.float32))
    gate, up = tl.minimum(gate, limit), tl.clamp(up, -limit, limit)
    out = gate / (1.0 + tl.exp(-alpha * gate)) * (up + 1.0)
    if HAS_IDS:  # the next product multiplies these rows with zeros, which must stay zeros
        mask = columns < size
        out = tl.where(is_here, out, 0.0)
    tl.store(out_ptr + row.to(tl.int64) * size + columns, out.to(out_ptr.dtype.element_ty), mask=mask)


def clamped_gate(
    y: torch.Tensor,
    bias: torch.Tensor,
    ends: torch.Tensor | None,
    clamp: ClampedGate,
    ids: torch.Tensor | None = None,
    first_expert: int = 0,
) -> torch.Tensor:
    """What an expert gives its second product, of its first one: see ClampedGate.

    Args:
        y: contiguous [num_rows, 2 * size], gate and up in turns, sorted by expert if there are ends.
        bias: contiguous [num_experts, 2 * size], added before.
        ends: int32 [num_experts], where each expert's rows end. Behind the last, rows hold anything.
        ids: without ends, contiguous integers [num_rows]: the expert of each row, counted from `first_expert` on. Rows
            of experts that are not here give zeros.

    Returns:
        [num_rows, size] in the type of y.
    """
    num_rows, size = y.shape[0], y.shape[1] // 2
    num_experts = len(bias)
    assert y.is_contiguous() and bias.is_contiguous() and bias.shape[1] == 2 * size
    assert (ends is None) != (ids is None) and (ends is None or len(ends) == num_experts)
    assert ids is None or (ids.is_contiguous() and len(ids) == num_rows)
    out = torch.empty((num_rows, size), dtype=y.dtype, device=y.device)
    early = can_launch_early(y.device)
    _clamped_gate_kernel[(num_rows, triton.cdiv(size, BLOCK))](
        y, bias, y if ends is None else ends, y if ids is None else ids, out, num_experts, first_expert, size,
        clamp.alpha, clamp.limit, HAS_IDS=ids is not None, BLOCK=BLOCK, BLOCK_EXPERTS=next_power_of_2(num_experts),
        EARLY=early, **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    return out
