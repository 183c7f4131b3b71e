"""Owns how the newest token of each running request becomes a forward pass."""

import torch

from ramet.srt.batch.forward_batch_info import ForwardBatch, ForwardMode
from ramet.srt.mem_cache.memory_pool import ReqToPagePool


def make_decode_batch(
    req_pool: ReqToPagePool, page_size: int, rows: torch.Tensor, starts: torch.Tensor, starts_cpu: list[int]
) -> ForwardBatch:
    """The newest token of each of some requests as a pass. Nothing of it depends on values on the host but its sizes.

    Args:
        rows: int64 [batch_size], of the page table.
        starts: int64 [batch_size], tokens in the cache before the pass; `starts_cpu` are the same on the host.
    """
    num_pages = max(starts_cpu, default=0) // page_size + 1
    block_tables = req_pool.req_to_page[:, :num_pages].index_select(0, rows)
    pages = block_tables.gather(1, (starts // page_size).unsqueeze(1)).squeeze(1)
    return ForwardBatch(
        forward_mode=ForwardMode.DECODE,
        input_ids=req_pool.last_tokens.index_select(0, rows),
        positions=starts,
        out_cache_loc=pages * page_size + starts % page_size,
        block_tables=block_tables,
        seq_lens=(starts + 1).to(torch.int32),
        seq_lens_cpu=[start + 1 for start in starts_cpu],
        extend_lens_cpu=[1] * len(starts_cpu),
        logits_rows=torch.arange(len(starts_cpu), device=rows.device),
    )
