"""Owns the kernels of the gated delta rule: chunks of prompts in two steps, and single tokens.

What the tokens of a chunk write depends on each other. The first step solves that for every chunk by itself, as a
function of the state S before it (Yang et al., 2024): they write W - R S, and give Q S + A (W - R S). The second goes
through a sequence's chunks and carries the state, which becomes kept * S + K^T (W - R S).
"""

import torch
import triton
import triton.language as tl

from ramet.srt.batch.delta_pass import DeltaPass
from ramet.srt.layers.kernels.delta_columns import gate_column, kept_and_written, number_columns
from ramet.srt.layers.kernels.runtime import has_large_shared_memory, next_power_of_2

NORM_EPS = tl.constexpr(1e-6)  # of queries and keys
LEAST_DOT = 16  # rows and columns of a product
BLOCK_COLUMNS = 32  # of the values, that a program takes which holds a part of a state
NORM_HEADS = 4


@triton.jit
def _load_rows(ptr, tokens, stride, first, columns, is_token, is_column):
    """float32 [tokens, columns], zeros outside."""
    places = tokens[:, None] * stride + first + columns[None, :]
    return tl.load(ptr + places, mask=is_token[:, None] & is_column[None, :], other=0.0).to(tl.float32)


@triton.jit
def _normed(x):
    """Rows of length 1."""
    return x * tl.rsqrt(tl.sum(x * x, axis=1) + NORM_EPS)[:, None]


@triton.jit
def _solve_kernel(
    mixed_ptr, ba_ptr, a_log_ptr, dt_bias_ptr, chunks_ptr,
    writes_ptr, reads_ptr, scores_ptr, queries_ptr, keys_ptr, kept_ptr, mixed_stride, ba_stride,
    NUM_KEYS: tl.constexpr, REPEATS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    GROUPED: tl.constexpr, CHUNK: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program takes a chunk and a value head, and gives what the scan needs of them; see delta_rule."""
    length = tl.load(chunks_ptr + tl.program_id(0) * 4 + 1)
    if length > 0:
        start = tl.load(chunks_ptr + tl.program_id(0) * 4).to(tl.int64)
        head = tl.program_id(1)
        num_heads = NUM_KEYS * REPEATS
        dtype = mixed_ptr.dtype.element_ty
        offsets = tl.arange(0, CHUNK)
        tokens = start + offsets
        is_token = offsets < length
        key_columns, value_columns = tl.arange(0, KEYS), tl.arange(0, VALUES)
        is_key, is_value = key_columns < KEY_DIM, value_columns < VALUE_DIM
        rows = tokens * num_heads + head
        key_places = rows[:, None] * KEY_DIM + key_columns[None, :]
        in_keys = is_token[:, None] & is_key[None, :]

        b_column, a_column = number_columns(head, NUM_KEYS, REPEATS, GROUPED)
        b = tl.load(ba_ptr + tokens * ba_stride + b_column, mask=is_token, other=0.0)
        a = tl.load(ba_ptr + tokens * ba_stride + a_column, mask=is_token, other=0.0)
        g, beta = kept_and_written(b, a, a_log_ptr, dt_bias_ptr, head)
        g, beta = tl.where(is_token, g, 0.0), tl.where(is_token, beta, 0.0)
        total = tl.cumsum(g, axis=0)
        last = tl.sum(g, axis=0)
        tl.store(kept_ptr + tl.program_id(0) * num_heads + head, tl.exp(last))
        later, earlier = offsets[:, None], offsets[None, :]
        kept = tl.exp(tl.where(later >= earlier, total[:, None] - total[None, :], float("-inf")))

        first_query = head // REPEATS * KEY_DIM
        first_key = NUM_KEYS * KEY_DIM + first_query
        k = _normed(_load_rows(mixed_ptr, tokens, mixed_stride, first_key, key_columns, is_token, is_key))
        tl.store(keys_ptr + key_places, (k * tl.exp(last - total)[:, None]).to(dtype), mask=in_keys)
        low = k.to(dtype)
        overlap = tl.dot(low, tl.trans(low), input_precision=PRECISION)
        q = _load_rows(mixed_ptr, tokens, mixed_stride, first_query, key_columns, is_token, is_key)
        q = _normed(q) * (KEY_DIM**-0.5)
        tl.store(queries_ptr + key_places, (q * tl.exp(total)[:, None]).to(dtype), mask=in_keys)
        scores = tl.dot(q.to(dtype), tl.trans(low), input_precision=PRECISION) * kept
        places = rows[:, None] * CHUNK + offsets[None, :]
        tl.store(scores_ptr + places, scores.to(dtype), mask=is_token[:, None] & is_token[None, :])

        system = tl.where(later > earlier, beta[:, None] * kept * overlap, 0.0)
        inverse = tl.where(later == earlier, 1.0, 0.0)
        for row in range(1, length):  # of the inverse of 1 + system, by those above it
            factors = tl.sum(tl.where(later == row, system, 0.0), axis=0)
            update = tl.sum(factors[:, None] * inverse, axis=0)
            inverse -= tl.where(later == row, update[None, :], 0.0)
        inverse = inverse.to(dtype)
        first_value = 2 * NUM_KEYS * KEY_DIM + head * VALUE_DIM
        v = _load_rows(mixed_ptr, tokens, mixed_stride, first_value, value_columns, is_token, is_value)
        writes = tl.dot(inverse, (v * beta[:, None]).to(dtype), input_precision=PRECISION)
        places = rows[:, None] * VALUE_DIM + value_columns[None, :]
        tl.store(writes_ptr + places, writes.to(dtype), mask=is_token[:, None] & is_value[None, :])
        k = _normed(_load_rows(mixed_ptr, tokens, mixed_stride, first_key, key_columns, is_token, is_key))
        reads = tl.dot(inverse, (k * (beta * tl.exp(total))[:, None]).to(dtype), input_precision=PRECISION)
        tl.store(reads_ptr + key_places, reads.to(dtype), mask=in_keys)


@triton.jit
def _scan_kernel(
    writes_ptr, reads_ptr, scores_ptr, queries_ptr, keys_ptr, kept_ptr, state_ptr, out_ptr,
    chunks_ptr, sequences_ptr, slots_ptr, state_stride, num_heads,
    KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, CHUNK: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program takes a sequence, a value head, and some columns of its values."""
    sequence_ptr = sequences_ptr + tl.program_id(0) * 5
    num_chunks = tl.load(sequence_ptr + 1)
    if num_chunks > 0:
        first_chunk = tl.load(sequence_ptr)
        slot = tl.load(slots_ptr + tl.load(sequence_ptr + 2)).to(tl.int64)
        is_new = tl.load(sequence_ptr + 3)
        head = tl.program_id(1)
        offsets = tl.arange(0, CHUNK)
        key_columns = tl.arange(0, KEYS)
        value_columns = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
        is_key, is_value = key_columns < KEY_DIM, value_columns < VALUE_DIM
        in_state = is_key[:, None] & is_value[None, :]
        own = head * KEY_DIM * VALUE_DIM + key_columns[:, None] * VALUE_DIM + value_columns[None, :]
        is_kept = in_state & (own * 0 + is_new == 0)
        state = tl.load(state_ptr + slot * state_stride + own, mask=is_kept, other=0.0)
        dtype = out_ptr.dtype.element_ty
        for index in range(first_chunk, first_chunk + num_chunks):
            start = tl.load(chunks_ptr + index * 4).to(tl.int64)
            length = tl.load(chunks_ptr + index * 4 + 1)
            save = tl.load(chunks_ptr + index * 4 + 3).to(tl.int64)
            is_token = offsets < length
            rows = (start + offsets) * num_heads + head
            places = rows[:, None] * KEY_DIM + key_columns[None, :]
            in_keys = is_token[:, None] & is_key[None, :]
            reads = tl.load(reads_ptr + places, mask=in_keys, other=0.0)
            q = tl.load(queries_ptr + places, mask=in_keys, other=0.0)
            k = tl.load(keys_ptr + places, mask=in_keys, other=0.0)
            places = rows[:, None] * CHUNK + offsets[None, :]
            scores = tl.load(scores_ptr + places, mask=is_token[:, None] & is_token[None, :], other=0.0)
            places = rows[:, None] * VALUE_DIM + value_columns[None, :]
            in_out = is_token[:, None] & is_value[None, :]
            writes = tl.load(writes_ptr + places, mask=in_out, other=0.0).to(tl.float32)
            before = state.to(dtype)
            written = (writes - tl.dot(reads, before, input_precision=PRECISION)).to(dtype)
            out = tl.dot(q, before, input_precision=PRECISION)
            out += tl.dot(scores, written, input_precision=PRECISION)
            tl.store(out_ptr + places, out.to(dtype), mask=in_out)
            kept = tl.load(kept_ptr + index * num_heads + head)
            state = state * kept + tl.dot(tl.trans(k), written, input_precision=PRECISION)
            if save >= 0:
                tl.store(state_ptr + save * state_stride + own, state, mask=in_state)
        tl.store(state_ptr + slot * state_stride + own, state, mask=in_state)


@triton.jit
def _step_kernel(
    mixed_ptr, ba_ptr, a_log_ptr, dt_bias_ptr, state_ptr, out_ptr, rows_ptr, positions_ptr,
    slots_ptr, mixed_stride, ba_stride, state_stride,
    NUM_KEYS: tl.constexpr, REPEATS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    GROUPED: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program takes a token that is a sequence by itself, a value head, and some columns of its values."""
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + token)
    if row >= 0:
        slot = tl.load(slots_ptr + row).to(tl.int64)
        position = tl.load(positions_ptr + token)
        head = tl.program_id(1)
        key_columns = tl.arange(0, KEYS)
        value_columns = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
        is_key, is_value = key_columns < KEY_DIM, value_columns < VALUE_DIM
        in_state = is_key[:, None] & is_value[None, :]
        own = head * KEY_DIM * VALUE_DIM + key_columns[:, None] * VALUE_DIM + value_columns[None, :]
        state_ptrs = state_ptr + slot * state_stride + own
        state = tl.load(state_ptrs, mask=in_state & (own * 0 + position > 0), other=0.0)
        queries = mixed_ptr + token * mixed_stride + head // REPEATS * KEY_DIM + key_columns
        q = tl.load(queries, mask=is_key, other=0.0).to(tl.float32)
        k = tl.load(queries + NUM_KEYS * KEY_DIM, mask=is_key, other=0.0).to(tl.float32)
        values = mixed_ptr + token * mixed_stride + 2 * NUM_KEYS * KEY_DIM + head * VALUE_DIM + value_columns
        v = tl.load(values, mask=is_value, other=0.0).to(tl.float32)
        b_column, a_column = number_columns(head, NUM_KEYS, REPEATS, GROUPED)
        numbers = ba_ptr + token * ba_stride
        g, beta = kept_and_written(
            tl.load(numbers + b_column), tl.load(numbers + a_column), a_log_ptr, dt_bias_ptr, head
        )
        q = q * tl.rsqrt(tl.sum(q * q, axis=0) + NORM_EPS) * (KEY_DIM**-0.5)
        k = k * tl.rsqrt(tl.sum(k * k, axis=0) + NORM_EPS)
        state = state * tl.exp(g)
        written = beta * (v - tl.sum(state * k[:, None], axis=0))
        state += k[:, None] * written[None, :]
        tl.store(state_ptrs, state, mask=in_state)
        out = tl.sum(state * q[:, None], axis=0)
        places = (token * NUM_KEYS * REPEATS + head) * VALUE_DIM + value_columns
        tl.store(out_ptr + places, out.to(out_ptr.dtype.element_ty), mask=is_value)


@triton.jit
def _norm_kernel(
    out_ptr, z_ptr, norm_ptr, z_stride, eps,
    NUM_KEYS: tl.constexpr, REPEATS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    GROUPED: tl.constexpr, VALUES: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """One program norms and gates some heads of a token, in place."""
    token = tl.program_id(0).to(tl.int64)
    heads, columns = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, VALUES)
    mask = (heads < NUM_KEYS * REPEATS)[:, None] & (columns < VALUE_DIM)[None, :]
    places = (token * NUM_KEYS * REPEATS + heads)[:, None] * VALUE_DIM + columns[None, :]
    out = tl.load(out_ptr + places, mask=mask, other=0.0).to(tl.float32)
    gates = gate_column(heads, NUM_KEYS, REPEATS, KEY_DIM, VALUE_DIM, GROUPED)[:, None] + columns[None, :]
    z = tl.load(z_ptr + token * z_stride + gates, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(out * out, axis=1) / VALUE_DIM + eps)[:, None]
    weight = tl.load(norm_ptr + columns, mask=columns < VALUE_DIM, other=0.0)[None, :]
    out = out * scale * weight * (z * tl.sigmoid(z))
    tl.store(out_ptr + places, out.to(out_ptr.dtype.element_ty), mask=mask)


def delta_rule(
    mixed: torch.Tensor,
    qkvz: torch.Tensor,
    ba: torch.Tensor,
    state: torch.Tensor,
    state_slots: torch.Tensor,
    run: DeltaPass,
    *,
    a_log: torch.Tensor,
    dt_bias: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    num_key_heads: int,
    is_by_key_head: bool,
) -> torch.Tensor:
    """Carry the states of a pass's sequences over its tokens, and give the gated and normed outputs.

    Args:
        mixed: [num_tokens, num_channels]: queries, keys and values behind the convolution.
        qkvz, ba: what the projections give; rows may be apart.
        state: float32 [num_slots, num_heads, key_dim, value_dim], each slot contiguous.
        state_slots: int64, the slot of each row.
        a_log, dt_bias: float32 [num_heads].
        norm: float32 [value_dim].

    Returns:
        [num_tokens, num_heads * value_dim].
    """
    num_tokens = len(mixed)
    num_heads, key_dim, value_dim = state.shape[1:]
    assert state[0].is_contiguous() and qkvz.stride(1) == ba.stride(1) == mixed.stride(1) == 1
    out = torch.empty((num_tokens, num_heads * value_dim), dtype=mixed.dtype, device=mixed.device)
    keys, values = (max(LEAST_DOT, next_power_of_2(size)) for size in (key_dim, value_dim))
    block = min(BLOCK_COLUMNS, values)
    num_blocks = triton.cdiv(value_dim, block)
    sizes = {"KEY_DIM": key_dim, "VALUE_DIM": value_dim}
    shape = {"NUM_KEYS": num_key_heads, "REPEATS": num_heads // num_key_heads, **sizes, "GROUPED": is_by_key_head}
    numbers = a_log, dt_bias
    if run.has_singles:
        _step_kernel[(num_tokens, num_heads, num_blocks)](
            mixed, ba, *numbers, state, out, run.single_rows, run.positions, state_slots,
            mixed.stride(0), ba.stride(0), state.stride(0), **shape, KEYS=keys, BLOCK=block, num_warps=4,
        )  # fmt: skip
    if run.num_chunks:
        is_float32 = mixed.dtype == torch.float32
        precision = "tf32x3" if is_float32 else "tf32"
        columns = (value_dim, key_dim, run.chunk_size, key_dim, key_dim)
        parts = [torch.empty((num_tokens, num_heads, size), dtype=mixed.dtype, device=mixed.device) for size in columns]
        kept = torch.empty((run.num_chunks, num_heads), dtype=torch.float32, device=mixed.device)
        _solve_kernel[(run.num_chunks, num_heads)](
            mixed, ba, *numbers, run.chunks, *parts, kept, mixed.stride(0), ba.stride(0),
            **shape, CHUNK=run.chunk_size, KEYS=keys, VALUES=values, PRECISION=precision, num_warps=8,
        )  # fmt: skip
        _scan_kernel[(run.num_sequences, num_heads, num_blocks)](
            *parts, kept, state, out, run.chunks, run.sequences, state_slots, state.stride(0), num_heads,
            **sizes, CHUNK=run.chunk_size, KEYS=keys, BLOCK=block, PRECISION=precision,
            num_warps=4, num_stages=2 if has_large_shared_memory(mixed.device) and not is_float32 else 1,
        )  # fmt: skip
    _norm_kernel[(num_tokens, triton.cdiv(num_heads, NORM_HEADS))](
        out, qkvz, norm, qkvz.stride(0), eps, **shape, VALUES=values, HEADS=NORM_HEADS
    )
    return out
