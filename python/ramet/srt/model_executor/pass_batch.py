"""Owns how the new tokens of a pass become tensors on the device, where it is launched and where it is captured."""

from typing import NamedTuple

import numpy as np
import torch

from ramet.srt.batch.batch_plan import LAST_TOKEN
from ramet.srt.batch.forward_batch_info import ForwardBatch, ForwardMode
from ramet.srt.batch.pass_tokens import GroupedTokens, PassTokens
from ramet.srt.layers.kernels.runtime import use_kernels
from ramet.srt.mem_cache.memory_pool import ReqToPagePool
from ramet.srt.utils.device import to_device


class TokenPlaces(NamedTuple):
    """Of the tokens of a pass; see ForwardBatch."""

    input_ids: torch.Tensor
    out_cache_loc: torch.Tensor
    seq_lens: torch.Tensor  # as if each token were a sequence
    window_cache_loc: torch.Tensor | None
    is_long: torch.Tensor | None


def token_inputs(tokens: PassTokens) -> np.ndarray:
    """int64 [3, num_tokens]: row, position and id of each token."""
    return np.stack([tokens.row_of_token, tokens.positions, tokens.ids])


def group_inputs(grouped: GroupedTokens) -> np.ndarray:
    """int64 [2, num_tokens]: row and id of each token of all groups."""
    return np.stack([grouped.rows, grouped.ids])


def make_forward_batch(
    req_pool: ReqToPagePool, page_size: int, tokens: PassTokens, grouped: GroupedTokens | None = None
) -> ForwardBatch:
    """A pass over the tokens.

    Args:
        grouped: with data-parallel attention those of all groups, of which `tokens` are this rank's.
    """
    device = req_pool.req_to_page.device
    rows, positions, ids = to_device(token_inputs(tokens), torch.int64, device)
    lora_slots, all_rows, all_ids = tokens.lora_slot_of_token, rows, ids
    if grouped is not None:
        all_rows, all_ids = to_device(group_inputs(grouped), torch.int64, device)
        lora_slots = grouped.lora_slots
    places = _token_places(req_pool, page_size, rows, positions, all_rows, all_ids)
    sequence_rows, seq_lens = rows, places.seq_lens
    if not tokens.is_decode:
        sequence_rows, seq_lens = to_device(np.stack([tokens.rows, tokens.ends]), torch.int64, device)
    return ForwardBatch(
        forward_mode=ForwardMode.DECODE if tokens.is_decode else ForwardMode.EXTEND,
        input_ids=places.input_ids,
        positions=positions,
        out_cache_loc=places.out_cache_loc,
        req_to_page=req_pool.req_to_page,
        rows=sequence_rows,
        seq_lens=seq_lens.to(torch.int32),
        tokens=tokens,
        is_long=places.is_long,
        window_map=req_pool.window_map,
        state_slots=req_pool.state_slots,
        window_cache_loc=places.window_cache_loc,
        lora_slots=lora_slots,
        group_sizes=None if grouped is None else grouped.sizes,
        own_group=0 if grouped is None else grouped.own_group,
    )


def make_captured_batch(
    req_pool: ReqToPagePool,
    page_size: int,
    inputs: torch.Tensor,
    forward_mode: ForwardMode,
    groups: tuple[torch.Tensor, int] | None = None,
) -> ForwardBatch:
    """The same in terms of fixed addresses only: each token counts as a sequence, which it is when all decode.

    Args:
        inputs: int64 [3, num_tokens], as of `token_inputs`; each replay reads what is there then.
        groups: with data-parallel attention int64 [2, number of groups * num_tokens], as of `group_inputs`, and which
            of the groups is this rank's.
    """
    rows, positions, ids = inputs
    all_rows, all_ids, own = rows, ids, 0
    if groups is not None:
        (all_rows, all_ids), own = groups
    width = req_pool.req_to_page.shape[1]
    zeros = np.zeros(len(rows), dtype=np.int64)
    places = _token_places(req_pool, page_size, rows, positions, all_rows, all_ids)
    return ForwardBatch(
        forward_mode=forward_mode,
        input_ids=places.input_ids,
        positions=positions,
        out_cache_loc=places.out_cache_loc,
        req_to_page=req_pool.req_to_page,
        rows=rows,
        seq_lens=places.seq_lens,
        tokens=PassTokens(zeros, zeros + (width * page_size - 1), zeros + 1, zeros),
        is_long=places.is_long,
        window_map=req_pool.window_map,
        state_slots=req_pool.state_slots,
        window_cache_loc=places.window_cache_loc,
        group_sizes=None if groups is None else [len(rows)] * (len(all_rows) // len(rows)),
        own_group=own,
        is_captured=True,
    )


def _token_places(
    req_pool: ReqToPagePool,
    page_size: int,
    rows: torch.Tensor,
    positions: torch.Tensor,
    id_rows: torch.Tensor,
    ids: torch.Tensor,
) -> TokenPlaces:
    """What the tokens' rows, all int64, tell of them; `id_rows` and `ids` may be those of more tokens."""
    table, last_tokens, window_map, is_long = (
        req_pool.req_to_page, req_pool.last_tokens, req_pool.window_map, req_pool.is_long,
    )  # fmt: skip
    if use_kernels(rows):
        from ramet.srt.layers.kernels.token_places import token_places

        found = token_places(
            rows, positions, id_rows, ids, table, last_tokens,
            page_size=page_size, last_token_id=LAST_TOKEN, window_map=window_map, is_long=is_long,
        )  # fmt: skip
        return TokenPlaces(*found)
    pages = table[rows, positions // page_size]
    window_pages = None if window_map is None else window_map[pages]
    return TokenPlaces(
        input_ids=torch.where(ids == LAST_TOKEN, last_tokens.index_select(0, id_rows), ids),
        out_cache_loc=_cache_slots(page_size, pages, positions),
        seq_lens=(positions + 1).to(torch.int32),
        window_cache_loc=None if window_pages is None else _cache_slots(page_size, window_pages, positions),
        is_long=None if is_long is None else is_long.index_select(0, rows),
    )


def _cache_slots(page_size: int, pages: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """int64 [num_tokens]: the KV slot of each token, whose page is given."""
    return pages * page_size + positions % page_size
