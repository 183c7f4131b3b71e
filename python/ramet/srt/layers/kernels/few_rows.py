"""Owns the product of a few rows with a weight matrix: a decode pass of some requests, bound by reading the weights."""

import torch
import triton
import triton.language as tl

from ramet.srt.layers.kernels.choices import FEW_ROWS, row_class
from ramet.srt.layers.kernels.runtime import can_launch_early, is_interpreted, num_multiprocessors
from ramet.srt.layers.kernels.split_sums import MAX_TILES, counts_of

MAX_ROWS = 32  # beyond that the library's kernels are as fast, measured on an H200
ROW_TILES = (16, 32, 64)
BY_LIBRARY = (0, 0)
BLOCK_OUTPUTS = 64
BLOCK_COLUMNS = 128
MAX_SPLITS = 4
FULL = 0.9  # of the multiprocessors that have a program: from there on columns are not split further
# By whether each multiprocessor has one program at most, which then must have more reads under way.
STAGES = {True: 5, False: 3}


@triton.jit
def _few_rows_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    partial_ptr,
    counts_ptr,
    num_rows,
    num_outputs,
    num_columns,
    x_stride,
    HAS_BIAS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program makes BLOCK_OUTPUTS outputs of all rows from its part of the columns.

    Where columns are split, each program leaves its sums, and the last one of a tile adds them up, always in the same
    order. `counts` tells how many of a tile have come, and is zero again after.
    """
    tile, part = tl.program_id(0), tl.program_id(1)
    outputs = tile * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    rows = tl.arange(0, BLOCK_ROWS)
    columns = part * (num_columns // SPLITS) + tl.arange(0, BLOCK_COLUMNS)
    row_mask = (rows < num_rows)[None, :]
    weight_ptrs = weight_ptr + outputs.to(tl.int64)[:, None] * num_columns + columns[None, :]
    x_ptrs = x_ptr + rows[None, :] * x_stride + columns[:, None]
    acc = tl.zeros([BLOCK_OUTPUTS, BLOCK_ROWS], tl.float32)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    for _ in range(0, num_columns // SPLITS, BLOCK_COLUMNS):
        weight = tl.load(weight_ptrs, eviction_policy="evict_first")
        x = tl.load(x_ptrs, mask=row_mask, other=0.0)
        acc = tl.dot(weight, x, acc)
        weight_ptrs += BLOCK_COLUMNS
        x_ptrs += BLOCK_COLUMNS
    is_last = True
    if SPLITS > 1:
        places = outputs[:, None] * BLOCK_ROWS + rows[None, :]
        size = num_outputs * BLOCK_ROWS
        tl.store(partial_ptr + part * size + places, acc)
        tl.debug_barrier()  # all of the program's sums are there before it counts
        is_last = tl.atomic_add(counts_ptr + tile, 1, sem="acq_rel") == SPLITS - 1
        if is_last:
            acc = tl.zeros([BLOCK_OUTPUTS, BLOCK_ROWS], tl.float32)
            for one in tl.static_range(SPLITS):
                acc += tl.load(partial_ptr + one * size + places, cache_modifier=".cg")
            tl.store(counts_ptr + tile, 0)
    if is_last:
        if HAS_BIAS:
            acc += tl.load(bias_ptr + outputs).to(tl.float32)[:, None]
        out_ptrs = out_ptr + rows[None, :] * num_outputs + outputs[:, None]
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=row_mask)


def takes(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the kernel multiplies such rows with such a matrix, and is faster than the library."""
    num_rows, num_outputs = x.shape[0], weight.shape[0]
    if not 1 < num_rows <= ROW_TILES[-1] or x.dtype != weight.dtype or x.dtype not in (torch.bfloat16, torch.float16):
        return False
    if not can_launch_early(x.device) and not is_interpreted():
        return False  # not measured there
    # The library reads matrices with more tiles of outputs at the memory's rate.
    is_whole = num_outputs % BLOCK_OUTPUTS == 0 and weight.shape[1] % (BLOCK_COLUMNS * MAX_SPLITS) == 0
    if not is_whole or num_outputs > MAX_TILES * BLOCK_OUTPUTS or x.stride(1) != 1 or not weight.is_contiguous():
        return False
    return _plan(num_rows, weight) != BY_LIBRARY


def _plan(num_rows: int, weight: torch.Tensor) -> tuple[int, int]:
    """(splits of the columns, stages) that were measured or are known to be the best, or BY_LIBRARY."""
    default = _default_plan(weight) if num_rows <= MAX_ROWS else BY_LIBRARY
    splits, stages = FEW_ROWS.pick(default, row_class(max(num_rows, ROW_TILES[0])), *weight.shape)
    return splits, stages


def _default_plan(weight: torch.Tensor) -> tuple[int, int]:
    num_tiles, num_multi = weight.shape[0] // BLOCK_OUTPUTS, num_multiprocessors(weight.device)
    splits = next((splits for splits in (1, 2) if num_tiles * splits >= FULL * num_multi), MAX_SPLITS)
    return splits, STAGES[num_tiles * splits <= num_multi]


def few_rows_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + b, summed in float32; see `takes`.

    Args:
        x: [num_rows, num_columns]; rows may be apart.
        weight: contiguous [num_outputs, num_columns].

    Returns:
        [num_rows, num_outputs].
    """
    num_rows, num_outputs = x.shape[0], weight.shape[0]
    num_tiles, plan = num_outputs // BLOCK_OUTPUTS, _plan(num_rows, weight)
    splits, stages = _default_plan(weight) if plan == BY_LIBRARY else plan
    block_rows = next(size for size in ROW_TILES if size >= num_rows)
    out = torch.empty((num_rows, num_outputs), dtype=x.dtype, device=x.device)
    partial = counts = out  # not touched
    if splits > 1:
        partial = torch.empty((splits, num_outputs, block_rows), dtype=torch.float32, device=x.device)
        counts = counts_of(x.device)
    early = can_launch_early(x.device)
    _few_rows_kernel[(num_tiles, splits)](
        x,
        weight,
        bias if bias is not None else x,
        out,
        partial,
        counts,
        num_rows,
        num_outputs,
        weight.shape[1],
        x.stride(0),
        HAS_BIAS=bias is not None,
        BLOCK_ROWS=block_rows,
        BLOCK_OUTPUTS=BLOCK_OUTPUTS,
        BLOCK_COLUMNS=BLOCK_COLUMNS,
        SPLITS=splits,
        EARLY=early,
        num_warps=4,
        num_stages=stages,
        **({"launch_pdl": True} if early else {}),
    )
    return out
