"""Owns what a pass asks of its tokens before the first layer, in one launch: their ids, and their KV slots."""

import torch
import triton
import triton.language as tl

BLOCK = 128  # tokens of a program


# Rows, positions and ids are parts of what a pass is told at once: they begin anywhere.
@triton.jit(
    do_not_specialize=["num_tokens", "num_ids", "table_stride"],
    do_not_specialize_on_alignment=["rows_ptr", "positions_ptr", "id_rows_ptr", "ids_ptr"],
)
def _token_places_kernel(
    rows_ptr,
    positions_ptr,
    id_rows_ptr,
    ids_ptr,
    table_ptr,
    last_tokens_ptr,
    map_ptr,
    row_is_long_ptr,
    out_ids_ptr,
    slots_ptr,
    seq_lens_ptr,
    window_slots_ptr,
    is_long_ptr,
    num_tokens,
    num_ids,
    table_stride,
    LAST_TOKEN: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HAS_MAP: tl.constexpr,
    HAS_LONG: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program takes BLOCK tokens, and as many ids: with data-parallel attention there are other groups' ids too."""
    tokens = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    has_id, mask = tokens < num_ids, tokens < num_tokens
    ids = tl.load(ids_ptr + tokens, mask=has_id, other=0)
    is_last = has_id & (ids == LAST_TOKEN)
    last_rows = tl.load(id_rows_ptr + tokens, mask=is_last, other=0)
    last = tl.load(last_tokens_ptr + last_rows, mask=is_last, other=0)
    tl.store(out_ids_ptr + tokens, tl.where(is_last, last, ids), mask=has_id)
    rows = tl.load(rows_ptr + tokens, mask=mask, other=0)
    positions = tl.load(positions_ptr + tokens, mask=mask, other=0)
    pages = tl.load(table_ptr + rows * table_stride + positions // PAGE_SIZE, mask=mask, other=0)
    places = positions % PAGE_SIZE
    tl.store(slots_ptr + tokens, pages * PAGE_SIZE + places, mask=mask)
    tl.store(seq_lens_ptr + tokens, (positions + 1).to(tl.int32), mask=mask)
    if HAS_MAP:
        mapped = tl.load(map_ptr + pages, mask=mask, other=0)
        tl.store(window_slots_ptr + tokens, mapped * PAGE_SIZE + places, mask=mask)
    if HAS_LONG:
        tl.store(is_long_ptr + tokens, tl.load(row_is_long_ptr + rows, mask=mask, other=0), mask=mask)


def token_places(
    rows: torch.Tensor,
    positions: torch.Tensor,
    id_rows: torch.Tensor,
    ids: torch.Tensor,
    req_to_page: torch.Tensor,
    last_tokens: torch.Tensor,
    *,
    page_size: int,
    last_token_id: int,
    window_map: torch.Tensor | None = None,
    is_long: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """What is known of the tokens by what is kept for each row.

    Args:
        rows, positions: int64 [num_tokens], contiguous.
        id_rows, ids: int64 [num_ids], contiguous; `last_token_id` stands for the row's last token.
        req_to_page, last_tokens, window_map, is_long: see ReqToPagePool.

    Returns:
        Ids, KV slots, int32 positions + 1, and with a map the slots in layers with a window, with `is_long` those of
        the tokens' rows.
    """
    num_tokens, num_ids, device = len(rows), len(ids), rows.device
    assert req_to_page.stride(1) == 1
    out_ids, slots = torch.empty_like(ids), torch.empty_like(rows)
    seq_lens = torch.empty(num_tokens, dtype=torch.int32, device=device)
    window_slots = None if window_map is None else torch.empty_like(rows)
    out_is_long = None if is_long is None else torch.empty(num_tokens, dtype=torch.bool, device=device)
    _token_places_kernel[(triton.cdiv(max(num_tokens, num_ids, 1), BLOCK),)](
        rows, positions, id_rows, ids, req_to_page, last_tokens, rows if window_map is None else window_map,
        rows if is_long is None else is_long, out_ids, slots, seq_lens, rows if window_slots is None else window_slots,
        rows if out_is_long is None else out_is_long, num_tokens, num_ids, req_to_page.stride(0),
        LAST_TOKEN=last_token_id, PAGE_SIZE=page_size, HAS_MAP=window_map is not None, HAS_LONG=is_long is not None,
        BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return out_ids, slots, seq_lens, window_slots, out_is_long
