"""The KV cache's memory on the host."""

import psutil
import pytest
import torch
from ramet.srt.mem_cache.memory_pool import KVSpec, TokenToKVPool


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
    assert pool.get_kv_buffer(0)[0].data_ptr() == address and not pool.get_kv_buffer(3)[0].any()
    with pytest.raises(RuntimeError, match="--enable-memory-saver"):
        make_pool().put_away()


def make_pool(**options):
    return TokenToKVPool(
        num_pages=4095, page_size=16, layers=[KVSpec(4, 64, 64)] * 8, dtype=torch.bfloat16,
        device=torch.device("cpu"), **options,
    )  # fmt: skip


def test_unused_kv_cache_takes_no_memory():
    """Touching gigabytes of fresh memory takes tens of seconds, and nobody has asked for a token yet."""
    before = psutil.Process().memory_info().rss
    pool = make_pool()
    taken = psutil.Process().memory_info().rss - before
    assert pool.buffer.nbytes == 512 << 20
    assert taken < 64 << 20
    assert not pool.get_kv_buffer(3)[1][-16:].any()


def test_each_layer_keeps_what_its_spec_says_and_nothing_else():
    specs = [KVSpec(4, 8, 8), KVSpec(1, 24, 16, is_latent=True), KVSpec(1, 24, 16, is_latent=True, index_dim=10),
             KVSpec(2, 12, 6)]  # fmt: skip
    pool = TokenToKVPool(
        num_pages=3, page_size=2, layers=specs, dtype=torch.float32, device=torch.device("cpu")
    )  # fmt: skip
    assert [spec.bytes_per_token(torch.float32) for spec in specs] == [256, 96, 136, 144]
    assert pool.buffer.nbytes == (3 + 1) * 2 * (256 + 96 + 136 + 144)
    for layer_id, spec in enumerate(specs):
        keys, values = pool.get_kv_buffer(layer_id)
        assert keys.shape == (8, spec.num_kv_heads, spec.key_dim) and not keys.any()
        assert values.shape == (8, spec.num_kv_heads, spec.value_dim) and not values.any()
        values.fill_(2.0)
        assert keys.any() == spec.is_latent  # whose values are a part of the keys
        keys.fill_(1.0)
        if spec.index_dim:
            index_keys = pool.get_index_keys(layer_id)
            assert index_keys.shape == (8, spec.index_dim) and not index_keys.any()
            index_keys.fill_(3.0)
            assert (keys == 1.0).all()
    assert not (pool.buffer == 0).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("specs", [[KVSpec(2, 8, 4)] * 3, [KVSpec(1, 24, 16, is_latent=True, index_dim=5)] * 2])
def test_pages_are_copied_from_one_cache_to_another(dtype, specs):
    def make():
        return TokenToKVPool(num_pages=6, page_size=4, layers=specs, dtype=dtype, device=torch.device("cpu"))

    giver, taker = make(), make()
    bits = torch.randint(0, 255, giver.buffer.view(torch.uint8).shape, dtype=torch.uint8)
    giver.buffer.view(torch.uint8).copy_(bits)
    data = giver.read_pages([5, 2])
    assert len(data) == 2 * giver.page_nbytes and giver.layout == taker.layout
    taker.write_pages([1, 6], data)
    assert taker.read_pages([1, 6]) == data and not any(taker.read_pages([2, 3, 4, 5]))
    for layer_id in range(len(specs)):
        for given, taken in zip(giver.get_kv_buffer(layer_id), taker.get_kv_buffer(layer_id), strict=True):
            given, taken = given.contiguous().view(torch.uint8), taken.contiguous().view(torch.uint8)
            assert torch.equal(taken[4:8], given[20:24]) and torch.equal(taken[24:28], given[8:12])
