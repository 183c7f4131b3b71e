"""Owns the kernels of the convolution before a gated delta net: chunks of prompts, single tokens, and what is kept.

The inputs before a sequence's new tokens come from its state; of one that begins they are zeros.
"""

import torch
import triton
import triton.language as tl

from ramet.srt.batch.delta_pass import DeltaPass
from ramet.srt.layers.kernels.delta_columns import channel_columns

BLOCK_CHANNELS = 256
CHUNK_BLOCK = 32  # channels of a program that takes a chunk


@triton.jit
def _conv_chunks_kernel(
    x_ptr, state_ptr, weight_ptr, out_ptr, chunks_ptr, sequences_ptr, slots_ptr, x_stride, state_stride, num_channels,
    NUM_KEYS: tl.constexpr, KEY_DIM: tl.constexpr, VALUES: tl.constexpr, GROUPED: tl.constexpr,
    KERNEL: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program takes a chunk's tokens and some channels."""
    chunk_ptr = chunks_ptr + tl.program_id(0) * 4
    length = tl.load(chunk_ptr + 1)
    if length > 0:
        start = tl.load(chunk_ptr).to(tl.int64)
        sequence_ptr = sequences_ptr + tl.load(chunk_ptr + 2) * 5
        first = tl.load(sequence_ptr + 4).to(tl.int64)
        is_new = tl.load(sequence_ptr + 3)
        slot = tl.load(slots_ptr + tl.load(sequence_ptr + 2)).to(tl.int64)
        channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        in_row = channels < num_channels
        columns = channel_columns(channels, NUM_KEYS, KEY_DIM, VALUES, GROUPED)
        offsets = tl.arange(0, CHUNK)
        is_token = offsets < length
        total = tl.zeros([CHUNK, BLOCK], dtype=tl.float32)
        for tap in tl.static_range(KERNEL):
            tokens = start + offsets + (tap - (KERNEL - 1))
            is_here = tokens >= first
            values = tl.load(
                x_ptr + tokens[:, None] * x_stride + columns[None, :],
                mask=(is_token & is_here)[:, None] & in_row[None, :], other=0.0,
            )  # fmt: skip
            rows = tokens - first + (KERNEL - 1)
            before = tl.load(
                state_ptr + slot * state_stride + rows[:, None] * num_channels + channels[None, :],
                mask=(is_token & (tokens < first) & (offsets * 0 + is_new == 0))[:, None] & in_row[None, :], other=0.0,
            )  # fmt: skip
            weight = tl.load(weight_ptr + channels * KERNEL + tap, mask=in_row, other=0.0).to(tl.float32)
            total += (values.to(tl.float32) + before.to(tl.float32)) * weight[None, :]
        out = total * tl.sigmoid(total)
        out_ptrs = out_ptr + (start + offsets)[:, None] * num_channels + channels[None, :]
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=is_token[:, None] & in_row[None, :])


@triton.jit
def _keep_one(
    x_ptr, state_ptr, x_stride, state_stride, num_channels, channels, columns, in_row, slot, target, first, stop,
    is_new, KERNEL: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """Write the inputs of the last tokens before `stop` to a slot; all are read before one is written."""
    rows = tl.arange(0, TAPS)
    tokens = stop - (KERNEL - 1) + rows
    is_row = (rows < KERNEL - 1)[:, None] & in_row[None, :]
    is_here = (tokens >= first)[:, None]
    values = tl.load(x_ptr + tokens[:, None] * x_stride + columns[None, :], mask=is_row & is_here, other=0.0)
    old = (tokens - first + (KERNEL - 1))[:, None] * num_channels + channels[None, :]
    is_before = is_row & ((tokens < first) & (rows * 0 + is_new == 0))[:, None]
    before = tl.load(state_ptr + slot * state_stride + old, mask=is_before, other=0.0)
    values = tl.where(is_here, values, before)
    tl.debug_barrier()
    places = target * state_stride + rows[:, None] * num_channels + channels[None, :]
    tl.store(state_ptr + places, values, mask=is_row)


@triton.jit
def _conv_keep_kernel(
    x_ptr, state_ptr, chunks_ptr, sequences_ptr, slots_ptr, x_stride, state_stride, num_channels,
    NUM_KEYS: tl.constexpr, KEY_DIM: tl.constexpr, VALUES: tl.constexpr, GROUPED: tl.constexpr,
    KERNEL: tl.constexpr, TAPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program takes a sequence and some channels: first what is kept on the way, then what is at its end."""
    sequence_ptr = sequences_ptr + tl.program_id(0) * 5
    num_chunks = tl.load(sequence_ptr + 1)
    if num_chunks > 0:
        first_chunk = tl.load(sequence_ptr)
        first = tl.load(sequence_ptr + 4).to(tl.int64)
        is_new = tl.load(sequence_ptr + 3)
        slot = tl.load(slots_ptr + tl.load(sequence_ptr + 2)).to(tl.int64)
        channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        in_row = channels < num_channels
        columns = channel_columns(channels, NUM_KEYS, KEY_DIM, VALUES, GROUPED)
        for index in range(first_chunk, first_chunk + num_chunks):
            stop = (tl.load(chunks_ptr + index * 4) + tl.load(chunks_ptr + index * 4 + 1)).to(tl.int64)
            save = tl.load(chunks_ptr + index * 4 + 3).to(tl.int64)
            target = tl.where(save >= 0, save, slot)
            if (save >= 0) | (index == first_chunk + num_chunks - 1):
                _keep_one(
                    x_ptr, state_ptr, x_stride, state_stride, num_channels, channels, columns, in_row, slot, target,
                    first, stop, is_new, KERNEL, TAPS,
                )  # fmt: skip


@triton.jit
def _conv_step_kernel(
    x_ptr, state_ptr, weight_ptr, out_ptr, rows_ptr, positions_ptr, slots_ptr, x_stride, state_stride, num_channels,
    NUM_KEYS: tl.constexpr, KEY_DIM: tl.constexpr, VALUES: tl.constexpr, GROUPED: tl.constexpr,
    KERNEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program takes a token that is a sequence by itself, and some channels, whose state moves on."""
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + token)
    if row >= 0:
        slot = tl.load(slots_ptr + row).to(tl.int64)
        position = tl.load(positions_ptr + token)
        channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        in_row = channels < num_channels
        columns = channel_columns(channels, NUM_KEYS, KEY_DIM, VALUES, GROUPED)
        x = tl.load(x_ptr + token * x_stride + columns, mask=in_row, other=0.0)
        last = tl.load(weight_ptr + channels * KERNEL + (KERNEL - 1), mask=in_row, other=0.0).to(tl.float32)
        total = x.to(tl.float32) * last
        base = state_ptr + slot * state_stride + channels
        for tap in tl.static_range(KERNEL - 1):
            before = tl.load(base + tap * num_channels, mask=in_row & (channels * 0 + position > 0), other=0.0)
            weight = tl.load(weight_ptr + channels * KERNEL + tap, mask=in_row, other=0.0).to(tl.float32)
            total += before.to(tl.float32) * weight
            if tap > 0:
                tl.store(base + (tap - 1) * num_channels, before, mask=in_row)
        tl.store(base + (KERNEL - 2) * num_channels, x, mask=in_row)
        out = total * tl.sigmoid(total)
        tl.store(out_ptr + token * num_channels + channels, out.to(out_ptr.dtype.element_ty), mask=in_row)


def convolve(
    x: torch.Tensor,
    state: torch.Tensor,
    weight: torch.Tensor,
    state_slots: torch.Tensor,
    run: DeltaPass,
    *,
    num_key_heads: int,
    key_dim: int,
    values: int,
    is_by_key_head: bool,
) -> torch.Tensor:
    """silu of the convolution of all tokens, and the states behind them.

    Args:
        x: what the projection gives, [num_tokens, columns]; rows may be apart.
        state: [num_slots, kernel_size - 1, num_channels], each slot contiguous.
        weight: contiguous [num_channels, 1, kernel_size].
        state_slots: int64, the slot of each row.
        values: columns of the values of a key head.

    Returns:
        [num_tokens, num_channels]: queries, keys and values of all heads.
    """
    num_channels, kernel_size = weight.shape[0], weight.shape[-1]
    assert x.stride(1) == 1 and state.stride()[1:] == (num_channels, 1) and weight.is_contiguous()
    out = torch.empty((len(x), num_channels), dtype=x.dtype, device=x.device)
    strides = x.stride(0), state.stride(0), num_channels
    shape = {"NUM_KEYS": num_key_heads, "KEY_DIM": key_dim, "VALUES": values, "GROUPED": is_by_key_head}
    if run.has_singles:
        _conv_step_kernel[(len(x), triton.cdiv(num_channels, BLOCK_CHANNELS))](
            x, state, weight, out, run.single_rows, run.positions, state_slots, *strides,
            **shape, KERNEL=kernel_size, BLOCK=BLOCK_CHANNELS,
        )  # fmt: skip
    if run.num_chunks:
        num_blocks = triton.cdiv(num_channels, CHUNK_BLOCK)
        _conv_chunks_kernel[(run.num_chunks, num_blocks)](
            x, state, weight, out, run.chunks, run.sequences, state_slots, *strides,
            **shape, KERNEL=kernel_size, CHUNK=run.chunk_size, BLOCK=CHUNK_BLOCK,
        )  # fmt: skip
        _conv_keep_kernel[(run.num_sequences, triton.cdiv(num_channels, BLOCK_CHANNELS))](
            x, state, run.chunks, run.sequences, state_slots, *strides,
            **shape, KERNEL=kernel_size, TAPS=triton.next_power_of_2(kernel_size - 1), BLOCK=BLOCK_CHANNELS,
        )  # fmt: skip
    return out
