"""Owns the kernel that quantises activations to fp8, one scale for each row."""

import torch
import triton
import triton.language as tl

from ramet.srt.layers.kernels.runtime import can_launch_early, next_power_of_2

MAX_FP8 = 448.0
MIN_SCALE = 1e-12


@triton.jit
def _quantize_rows_kernel(
    x_ptr, out_ptr, scales_ptr, x_stride, size, max_value, min_scale, BLOCK: tl.constexpr, EARLY: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < size
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x), axis=0) / max_value, min_scale)
    tl.store(scales_ptr + row, scale)
    tl.store(out_ptr + row * size + columns, (x / scale).to(out_ptr.dtype.element_ty), mask=mask)


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[num_rows, size] -> fp8 (e4m3) of the same shape, contiguous, and float32 scales [num_rows, 1]."""
    num_rows, size = x.shape
    assert x.stride(1) == 1
    values = torch.empty((num_rows, size), dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty((num_rows, 1), dtype=torch.float32, device=x.device)
    if num_rows:
        early = can_launch_early(x.device)
        block = next_power_of_2(size)
        _quantize_rows_kernel[(num_rows,)](
            x, values, scales, x.stride(0), size, MAX_FP8, MIN_SCALE, BLOCK=block, EARLY=early,
            num_warps=min(16, max(1, block // 256)), **({"launch_pdl": True} if early else {}),
        )  # fmt: skip
    return values, scales
