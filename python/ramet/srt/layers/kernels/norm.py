"""Owns the RMS norm kernel, with the residual addition before it or without."""

import torch
import triton
import triton.language as tl

from ramet.srt.layers.kernels.runtime import can_launch_early, next_power_of_2


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    x_stride,
    out_stride,
    size,
    eps,
    OFFSET: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program normalises one row. With a residual, the row's sum replaces the residual's row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < size
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32) + OFFSET
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row * size + columns, mask=mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(residual.dtype)
        tl.store(residual_ptr + row * size + columns, x, mask=mask)
    x = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / size + eps)
    tl.store(out_ptr + row * out_stride + columns, (x * scale * weight).to(out_ptr.dtype.element_ty), mask=mask)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None, *, offset: float = 0.0
) -> torch.Tensor:
    """norm(x) or norm(x + residual), over rows.

    Args:
        x: [num_rows, size]; rows may be apart.
        weight: [size]; `offset` is added to it, in float32.
        residual: contiguous [num_rows, size] of x's dtype; becomes x + residual.

    Returns:
        A new [num_rows, size].
    """
    num_rows, size = x.shape
    out = torch.empty((num_rows, size), dtype=x.dtype, device=x.device)
    if num_rows == 0:
        return out
    assert x.stride(1) == 1 and (residual is None or residual.is_contiguous())
    block = next_power_of_2(size)
    early = can_launch_early(x.device)
    _rms_norm_kernel[(num_rows,)](
        x,
        residual if residual is not None else x,
        weight,
        out,
        x.stride(0),
        out.stride(0),
        size,
        eps,
        OFFSET=offset,
        HAS_RESIDUAL=residual is not None,
        BLOCK=block,
        EARLY=early,
        num_warps=min(16, max(1, block // 256)),
        **({"launch_pdl": True} if early else {}),
    )
    return out
