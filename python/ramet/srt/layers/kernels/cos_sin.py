"""Owns the cosines and sines of a pass's positions, in one launch."""

import torch
import triton
import triton.language as tl

from ramet.srt.layers.kernels.runtime import next_power_of_2

BLOCK_TOKENS = 4


@triton.jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=["positions_ptr"])
def _cos_sin_kernel(
    positions_ptr,
    frequencies_ptr,
    long_frequencies_ptr,
    is_long_ptr,
    cos_ptr,
    sin_ptr,
    num_tokens,
    half,
    scale,
    HAS_LONG: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """One program takes BLOCK_TOKENS tokens. All of it is float32 until it is stored."""
    tokens = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    columns = tl.arange(0, BLOCK)
    there = tokens < num_tokens
    mask = there[:, None] & (columns < half)[None, :]
    positions = tl.load(positions_ptr + tokens, mask=there, other=0).to(tl.float32)
    frequencies = tl.load(frequencies_ptr + columns, mask=columns < half, other=0.0)[None, :]
    if HAS_LONG:
        is_long = tl.load(is_long_ptr + tokens, mask=there, other=0) != 0
        of_long = tl.load(long_frequencies_ptr + columns, mask=columns < half, other=0.0)[None, :]
        frequencies = tl.where(is_long[:, None], of_long, frequencies)
    angles = positions[:, None] * frequencies
    places = tokens.to(tl.int64)[:, None] * half + columns[None, :]
    tl.store(cos_ptr + places, (tl.cos(angles) * scale).to(cos_ptr.dtype.element_ty), mask=mask)
    tl.store(sin_ptr + places, (tl.sin(angles) * scale).to(sin_ptr.dtype.element_ty), mask=mask)


def cos_sin(
    positions: torch.Tensor,
    frequencies: torch.Tensor,
    scale: float,
    dtype: torch.dtype,
    long_frequencies: torch.Tensor | None = None,
    is_long: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scaled cosines and sines of positions * frequencies, contiguous [num_tokens, 1, half].

    Args:
        positions: int64 [num_tokens], contiguous.
        frequencies: float32 [half]; `long_frequencies`, for the tokens that `is_long`, bool [num_tokens], marks.
    """
    num_tokens, half = len(positions), len(frequencies)
    cos = torch.empty((num_tokens, 1, half), dtype=dtype, device=positions.device)
    sin = torch.empty_like(cos)
    has_long = long_frequencies is not None and is_long is not None
    _cos_sin_kernel[(max(1, triton.cdiv(num_tokens, BLOCK_TOKENS)),)](
        positions, frequencies, long_frequencies if has_long else frequencies, is_long if has_long else positions,
        cos, sin, num_tokens, half, float(scale), HAS_LONG=has_long, BLOCK=next_power_of_2(half),
        BLOCK_TOKENS=BLOCK_TOKENS, num_warps=4,
    )  # fmt: skip
    return cos, sin
