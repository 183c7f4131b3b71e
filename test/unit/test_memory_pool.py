"""The KV cache's memory on the host."""

import psutil
import pytest
import torch
from ramet.srt.mem_cache.memory_pool import MHATokenToKVPool


def test_a_kv_cache_that_is_put_away_comes_back_as_zeros():
    pool = make_pool(can_be_put_away=True)
    before = psutil.Process().memory_info().rss
    pool.buffer.fill_(1.0)
    address = pool.get_kv_buffer(0)[0].data_ptr()
    assert psutil.Process().memory_info().rss - before > 400 << 20
    pool.put_away()
    assert psutil.Process().memory_info().rss - before < 64 << 20
    pool.take_back()
    pool.take_back()
    assert pool.get_kv_buffer(0)[0].data_ptr() == address and not pool.buffer[3].any()
    with pytest.raises(RuntimeError, match="--enable-memory-saver"):
        make_pool().put_away()


def make_pool(**options):
    return MHATokenToKVPool(
        num_pages=4095, page_size=16, num_layers=8, num_kv_heads=4, head_dim=64, dtype=torch.bfloat16,
        device=torch.device("cpu"), **options,
    )  # fmt: skip


def test_unused_kv_cache_takes_no_memory():
    """Touching gigabytes of fresh memory takes tens of seconds, and nobody has asked for a token yet."""
    before = psutil.Process().memory_info().rss
    pool = make_pool()
    taken = psutil.Process().memory_info().rss - before
    assert pool.buffer.nbytes == 512 << 20
    assert taken < 64 << 20
    assert not pool.buffer[3, 1, -16:].any()
