"""Owns the kernel of the gated activations: act(first half) * second half."""

import torch
import triton
import triton.language as tl

from ramet.srt.layers.kernels.runtime import can_launch_early

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
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
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
