"""Owns the choice of the keys with the highest scores: a radix select, whose programs share a token's keys if need be.

Digit by digit from the highest, it counts the scores with each digit and finds that of the last one to be chosen. Of
equal scores the first are chosen, and all are written in the order of their positions, however many programs there are.
"""

import torch
import triton
import triton.language as tl

from ramet.srt.layers.kernels.runtime import can_launch_early, is_interpreted, num_multiprocessors

DIGITS = tl.constexpr(256)
PLACES = tl.constexpr(4)  # digits of a score
MOST_PARTS = tl.constexpr(32)  # of a token's keys, each with a program of its own that reads what all have counted
PROGRAMS = 4  # that a multiprocessor gets at most while tokens are cut into parts
WHOLE_BLOCKS = 4  # of keys, up to which one program takes less time than the launches of several


@triton.jit
def _ordered(scores):
    """float32 -> int64 below 2**32 in the same order; -0 is 0."""
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -2147483648)).to(tl.int64) & 0xFFFFFFFF


@triton.jit
def _slots(table_ptr, positions, mask, PAGE_SIZE: tl.constexpr):
    pages = tl.load(table_ptr + positions // PAGE_SIZE, mask=mask, other=0)
    return (pages * PAGE_SIZE + positions % PAGE_SIZE).to(tl.int32)


@triton.jit
def _count(scores_ptr, start, stop, prefix, place, BLOCK: tl.constexpr):
    """[DIGITS]: how many of the keys [start, stop) have each digit at a place, of those that have `prefix` before."""
    counts = tl.zeros([DIGITS], tl.int32)
    for key in tl.range(start, stop, BLOCK, num_stages=3):  # else each load would wait for the one before it
        positions = key + tl.arange(0, BLOCK)
        mask = positions < stop
        order = _ordered(tl.load(scores_ptr + positions, mask=mask, other=0.0))
        mask = mask & ((order >> (32 - 8 * place)) == prefix)
        counts += tl.histogram(((order >> (24 - 8 * place)) & 255).to(tl.int32), DIGITS, mask=mask)
    return counts


@triton.jit
def _find_digit(counts, missing):
    """The digit of the last of `missing` scores, from the highest on, and how many of those with it are among them."""
    digits = tl.arange(0, DIGITS)
    from_above = tl.cumsum(counts, axis=0, reverse=True)  # scores with this digit or a higher one
    digit = tl.max(tl.where(from_above >= missing, digits, 0), axis=0)
    return digit, missing - tl.sum(tl.where(digits > digit, counts, 0), axis=0)


@triton.jit
def _write_all(table_ptr, chosen_ptr, start, stop, BLOCK: tl.constexpr, PAGE_SIZE: tl.constexpr):
    for key in range(start, stop, BLOCK):
        positions = key + tl.arange(0, BLOCK)
        mask = positions < stop
        tl.store(chosen_ptr + positions, _slots(table_ptr, positions, mask, PAGE_SIZE), mask=mask)


@triton.jit
def _write_chosen(
    scores_ptr,
    table_ptr,
    chosen_ptr,
    start,
    stop,
    threshold,
    num_ties,
    num_chosen,
    num_equal,
    BLOCK: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
):
    """Write the slots of those of the keys [start, stop) that are above the threshold, and of the first that equal it.

    Args:
        num_ties: of a token's keys that equal it, how many are chosen.
        num_chosen, num_equal: of those before `start`.
    """
    for key in range(start, stop, BLOCK):
        positions = key + tl.arange(0, BLOCK)
        mask = positions < stop
        order = _ordered(tl.load(scores_ptr + positions, mask=mask, other=0.0))
        is_equal = mask & (order == threshold)
        equal = is_equal.to(tl.int32)
        is_chosen = mask & (order > threshold)
        is_chosen = is_chosen | (is_equal & (num_equal + tl.cumsum(equal, axis=0) <= num_ties))
        chosen = is_chosen.to(tl.int32)
        places = num_chosen + tl.cumsum(chosen, axis=0) - 1
        tl.store(chosen_ptr + places, _slots(table_ptr, positions, is_chosen, PAGE_SIZE), mask=is_chosen)
        num_chosen += tl.sum(chosen, axis=0)
        num_equal += tl.sum(equal, axis=0)


# Positions and rows are parts of what a pass is told at once, from any token on: they begin anywhere.
@triton.jit(do_not_specialize_on_alignment=["positions_ptr", "rows_ptr"])
def _choose_kernel(
    scores_ptr,
    table_ptr,
    rows_ptr,
    positions_ptr,
    chosen_ptr,
    scores_stride,
    table_stride,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program chooses one token's keys."""
    token = tl.program_id(0).to(tl.int64)
    scores_ptr += token * scores_stride
    chosen_ptr += token * TOP_K
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    num_keys = tl.load(positions_ptr + token).to(tl.int32) + 1
    table_ptr += tl.load(rows_ptr + token).to(tl.int64) * table_stride
    if num_keys <= TOP_K:
        _write_all(table_ptr, chosen_ptr, 0, num_keys, BLOCK, PAGE_SIZE)
    else:
        prefix = tl.zeros([], tl.int64)
        missing = tl.full([], TOP_K, tl.int32)
        for place in tl.static_range(PLACES):
            counts = _count(scores_ptr, 0, num_keys, prefix, place, BLOCK)
            digit, missing = _find_digit(counts, missing)
            prefix = prefix * DIGITS + digit
        zero = tl.zeros([], tl.int32)
        _write_chosen(
            scores_ptr, table_ptr, chosen_ptr, 0, num_keys, prefix, missing, zero, zero, BLOCK, PAGE_SIZE
        )  # fmt: skip


@triton.jit
def _load_counts(counts_ptr, num_live):
    """[MOST_PARTS, DIGITS]: what the programs of a token's parts have counted; zero of those that there aren't."""
    parts = tl.arange(0, MOST_PARTS)
    ptrs = counts_ptr + parts[:, None] * DIGITS + tl.arange(0, DIGITS)[None, :]
    return tl.load(ptrs, mask=(parts < num_live)[:, None], other=0)


@triton.jit(do_not_specialize=["part_keys", "num_parts", "place"], do_not_specialize_on_alignment=["positions_ptr"])
def _count_kernel(
    scores_ptr,
    positions_ptr,
    before_ptr,
    counts_ptr,
    above_ptr,
    found_ptr,
    scores_stride,
    part_keys,
    num_parts,
    place,
    TOP_K: tl.constexpr,
    IS_FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program counts the digits at one place of `part_keys` of a token's keys.

    But at the first place, it finds the digit before from what all of the token's programs have counted. `found` has
    for each place, in pairs, what is known of the last score to be chosen: the digits before, and how many of the
    scores that have them are chosen. `above` has for each part how many of its scores have higher digits before.
    """
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    num_keys = tl.load(positions_ptr + token).to(tl.int32) + 1
    start = part * part_keys
    if num_keys <= TOP_K or start >= num_keys:
        return
    first = token * num_parts
    prefix = tl.zeros([], tl.int64)
    missing = tl.full([], TOP_K, tl.int32)
    above = tl.zeros([], tl.int32)
    found_ptr += (place * tl.num_programs(0) + token) * 2
    if not IS_FIRST:
        counted = _load_counts(before_ptr + first * DIGITS, tl.cdiv(num_keys, part_keys))
        last_found_ptr = found_ptr - tl.num_programs(0).to(tl.int64) * 2
        missing = tl.load(last_found_ptr + 1).to(tl.int32)
        digit, missing = _find_digit(tl.sum(counted, axis=0), missing)
        prefix = tl.load(last_found_ptr) * DIGITS + digit
        digits = tl.arange(0, DIGITS)
        mine = tl.load(before_ptr + (first + part) * DIGITS + digits)
        above = tl.load(above_ptr + first + part) + tl.sum(tl.where(digits > digit, mine, 0), axis=0)
    if part == 0:
        tl.store(found_ptr, prefix)
        tl.store(found_ptr + 1, missing.to(tl.int64))
    tl.store(above_ptr + first + part, above)
    stop = tl.minimum(start + part_keys, num_keys)
    counts = _count(scores_ptr + token * scores_stride, start, stop, prefix, place, BLOCK)
    tl.store(counts_ptr + (first + part) * DIGITS + tl.arange(0, DIGITS), counts)


@triton.jit(
    do_not_specialize=["part_keys", "num_parts"], do_not_specialize_on_alignment=["positions_ptr", "rows_ptr"]
)  # fmt: skip
def _write_kernel(
    scores_ptr,
    table_ptr,
    rows_ptr,
    positions_ptr,
    chosen_ptr,
    counts_ptr,
    above_ptr,
    found_ptr,
    scores_stride,
    table_stride,
    part_keys,
    num_parts,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program writes what is chosen of `part_keys` of a token's keys, behind what is chosen of those before them.

    Args:
        counts_ptr: of the last place.
        above_ptr, found_ptr: as `_count_kernel` has written them, found_ptr of the last place.
    """
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    num_keys = tl.load(positions_ptr + token).to(tl.int32) + 1
    start = part * part_keys
    if start >= num_keys:
        return
    scores_ptr += token * scores_stride
    chosen_ptr += token * TOP_K
    table_ptr += tl.load(rows_ptr + token).to(tl.int64) * table_stride
    stop = tl.minimum(start + part_keys, num_keys)
    if num_keys <= TOP_K:
        _write_all(table_ptr, chosen_ptr, start, stop, BLOCK, PAGE_SIZE)
    else:
        first = token * num_parts
        num_live = tl.cdiv(num_keys, part_keys)
        counted = _load_counts(counts_ptr + first * DIGITS, num_live)
        missing = tl.load(found_ptr + token * 2 + 1).to(tl.int32)
        digit, missing = _find_digit(tl.sum(counted, axis=0), missing)
        threshold = tl.load(found_ptr + token * 2) * DIGITS + digit
        parts, digits = tl.arange(0, MOST_PARTS), tl.arange(0, DIGITS)
        is_before = (parts < part)[:, None]
        num_above = tl.load(above_ptr + first + parts, mask=parts < part, other=0)
        num_above += tl.sum(tl.where(is_before & (digits > digit)[None, :], counted, 0), axis=1)
        num_equal = tl.sum(tl.sum(tl.where(is_before & (digits == digit)[None, :], counted, 0), axis=1), axis=0)
        num_chosen = tl.sum(num_above, axis=0) + tl.minimum(num_equal, missing)
        _write_chosen(
            scores_ptr, table_ptr, chosen_ptr, start, stop, threshold, missing, num_chosen, num_equal, BLOCK, PAGE_SIZE
        )


def choose_keys(
    scores: torch.Tensor,
    table: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    chosen: torch.Tensor,
    *,
    page_size: int,
) -> None:
    """Write the slots of the keys with the highest scores, or of all that a token sees if they are not more.

    Few tokens with room for many scores take five launches, whose programs share a token's keys; else one is launched.

    Args:
        scores: as `index_scores` has written them; no NaN is expected, which counts as more or less than all others.
        table, rows, positions: as there.
        chosen: contiguous int32 [num_tokens, top_k]; what is behind a token's keys stays as it is.
    """
    num_tokens, top_k = chosen.shape
    assert chosen.is_contiguous() and scores.stride(1) == 1 == table.stride(1)
    early, device = can_launch_early(scores.device), scores.device
    options = {"EARLY": early, "num_warps": 8, **({"launch_pdl": True} if early else {})}
    block = 256 if is_interpreted() else 2048
    sizes = {"TOP_K": top_k, "BLOCK": block}
    places = scores, table, rows, positions, chosen
    strides = scores.stride(0), table.stride(0)
    part_keys = keys_of_part(device, num_tokens, scores.shape[1], block)
    num_parts = triton.cdiv(scores.shape[1], part_keys)
    if num_parts == 1:
        _choose_kernel[(num_tokens,)](*places, *strides, **sizes, PAGE_SIZE=page_size, **options)
        return
    # Of two places in turn: programs still read what was counted at one while others count at the next.
    counts = torch.empty((2, num_tokens, num_parts, DIGITS.value), dtype=torch.int32, device=device)
    above = torch.empty((num_tokens, num_parts), dtype=torch.int32, device=device)
    found = torch.empty((PLACES.value, num_tokens, 2), dtype=torch.int64, device=device)
    grid, cut = (num_tokens, num_parts), (part_keys, num_parts)
    for place in range(PLACES.value):
        now, before = counts[place % 2], counts[(place + 1) % 2]
        _count_kernel[grid](
            scores, positions, before, now, above, found, strides[0], *cut, place, **sizes, IS_FIRST=place == 0,
            **options,
        )  # fmt: skip
    last = counts[(PLACES.value - 1) % 2], above, found[-1]
    _write_kernel[grid](*places, *last, *strides, *cut, **sizes, PAGE_SIZE=page_size, **options)


def keys_of_part(device: torch.device, num_tokens: int, num_keys: int, block: int) -> int:
    """How many of `num_keys` keys of each token a program takes, in whole blocks; all of them if cutting doesn't pay.

    The same for passes of equal sizes whatever their lengths: a captured pass has room for as many as there can be.
    """
    num_blocks = triton.cdiv(num_keys, block)
    most = min(MOST_PARTS.value, PROGRAMS * num_multiprocessors(device) // num_tokens)
    if num_blocks <= WHOLE_BLOCKS or most < 2:
        return num_blocks * block
    return triton.cdiv(num_blocks, most) * block
