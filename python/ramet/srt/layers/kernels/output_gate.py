"""Owns the kernel that scales the output of attention by the sigmoid of gates, which stand among the queries."""

import torch
import triton
import triton.language as tl

from ramet.srt.layers.kernels.runtime import next_power_of_2


@triton.jit
def _gate_kernel(
    out_ptr, qkv_ptr, result_ptr, out_stride, qkv_stride, num_heads,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program takes a head of a token."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = tl.arange(0, BLOCK)
    mask = columns < HEAD_DIM
    gate_ptrs = qkv_ptr + token * qkv_stride + (2 * head + 1) * HEAD_DIM + columns
    gate = tl.load(gate_ptrs, mask=mask, other=0.0).to(tl.float32)
    out = tl.load(out_ptr + token * out_stride + head * HEAD_DIM + columns, mask=mask, other=0.0).to(tl.float32)
    result_ptrs = result_ptr + (token * num_heads + head) * HEAD_DIM + columns
    tl.store(result_ptrs, (out * tl.sigmoid(gate)).to(result_ptr.dtype.element_ty), mask=mask)


def gate_output(out: torch.Tensor, qkv: torch.Tensor) -> torch.Tensor:
    """A new [num_tokens, num_heads, head_dim]: `out`, scaled.

    Args:
        out: [num_tokens, num_heads, head_dim], each token contiguous.
        qkv: [num_tokens, columns], that begin with a query and a gate of each head in turns.
    """
    num_tokens, num_heads, head_dim = out.shape
    assert out.stride()[1:] == (head_dim, 1) and qkv.stride(1) == 1
    result = torch.empty((num_tokens, num_heads, head_dim), dtype=out.dtype, device=out.device)
    if num_tokens:
        block = next_power_of_2(head_dim)
        _gate_kernel[(num_tokens, num_heads)](
            out, qkv, result, out.stride(0), qkv.stride(0), num_heads, HEAD_DIM=head_dim, BLOCK=block, num_warps=1
        )
    return result
