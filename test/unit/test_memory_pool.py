"""The KV cache's memory on the host."""

import psutil
import torch
from ramet.srt.mem_cache.memory_pool import MHATokenToKVPool


def test_unused_kv_cache_takes_no_memory():
    """Touching gigabytes of fresh memory takes tens of seconds, and nobody has asked for a token yet."""
    before = psutil.Process().memory_info().rss
    pool = MHATokenToKVPool(
        num_pages=4095, page_size=16, num_layers=8, num_kv_heads=4, head_dim=64, dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )  # fmt: skip
    taken = psutil.Process().memory_info().rss - before
    assert pool.buffer.nbytes == 512 << 20
    assert taken < 64 << 20
    assert not pool.buffer[3, 1, -16:].any()
