"""Owns the kernel between two products of one row: it adds up the first one's sums and begins the norm for the second.

Each program has some columns: what needs all of them, the norm's factor, is left to the product.
"""

import torch
import triton
import triton.language as tl

from ramet.srt.layers.kernels.runtime import can_launch_early, next_power_of_2

BLOCK = 128  # columns of a program
MAX_PARTS_AT_ONCE = 64


@triton.jit(do_not_specialize=["num_parts"])
def _add_sums_kernel(
    parts_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    squares_ptr,
    num_parts,
    size,
    OFFSET: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program adds up BLOCK columns, PARTS of the parts at a time. The sum replaces the residual."""
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < size
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32) + OFFSET
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    x = tl.load(residual_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    for first in range(0, num_parts, PARTS):
        parts = first + tl.arange(0, PARTS)
        ptrs = parts_ptr + parts[:, None] * size + columns[None, :]
        x += tl.sum(tl.load(ptrs, mask=(parts < num_parts)[:, None] & mask[None, :], other=0.0), axis=0)
    total = x.to(residual_ptr.dtype.element_ty)
    tl.store(residual_ptr + columns, total, mask=mask)
    x = total.to(tl.float32)
    tl.store(out_ptr + columns, (x * weight).to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(squares_ptr + tl.program_id(0), tl.sum(tl.where(mask, x * x, 0.0), axis=0))


def add_sums(
    parts: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, offset: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """What an RMS norm of residual + sum of the parts begins with.

    Args:
        parts: float32 [num_parts, size], contiguous.
        residual: contiguous [1, size]; becomes the sum.
        weight: [size]; `offset` is added to it, in float32.

    Returns:
        The sum times the weight, [1, size] of residual's dtype, and the sums of its squares by some columns, float32.
    """
    num_parts, size = parts.shape
    assert residual.shape == (1, size) and residual.is_contiguous() and parts.is_contiguous()
    out, num_blocks = torch.empty_like(residual), triton.cdiv(size, BLOCK)
    squares = torch.empty(num_blocks, dtype=torch.float32, device=parts.device)
    early = can_launch_early(parts.device)
    _add_sums_kernel[(num_blocks,)](
        parts, residual, weight, out, squares, num_parts, size, OFFSET=offset,
        PARTS=min(MAX_PARTS_AT_ONCE, next_power_of_2(num_parts)), BLOCK=BLOCK, EARLY=early, num_warps=4,
        **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    return out, squares
