"""What a pass asks before its first layer: the kernels against the torch code of the same places."""

import pytest
import torch
from ramet.srt.batch.batch_plan import LAST_TOKEN
from ramet.srt.configs.rope_config import RopeConfig
from ramet.srt.layers.rotary_embedding import RotaryEmbedding
from ramet.srt.mem_cache.memory_pool import ReqToPagePool
from ramet.srt.model_executor import pass_batch

PAGE_SIZE = 4
LONGROPE = {
    "long_factor": [2.0, 3.0, 5.0, 7.0], "short_factor": [1.0, 1.5, 2.0, 2.5], "original_max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize("num_tokens, num_ids", [(1, 1), (130, 130), (3, 300), (0, 5)])
@pytest.mark.parametrize("has_more", [False, True])
def test_ids_and_places_of_tokens(device, monkeypatch, num_tokens, num_ids, has_more):
    """Also where other groups' ids are beside the own tokens, and with all that a pool may keep for rows."""
    size, generator = 7, torch.Generator().manual_seed(num_ids)
    pool = ReqToPagePool(size, 9, device, has_two_ropes=has_more, num_mapped_pages=50 if has_more else None)

    def draw(limit, *shape):
        return torch.randint(0, limit, shape, generator=generator)

    pool.req_to_page.copy_(draw(50, size + 1, 9))
    pool.last_tokens.copy_(1000 + draw(50, size + 1))
    if has_more:
        pool.is_long.copy_(draw(2, size + 1).bool())
        pool.window_map.copy_(draw(20, 51))
    # Places in a row of what a pass is told at once begin anywhere.
    rows, positions, _ = torch.stack([draw(size + 1, num_tokens + 1), draw(36, num_tokens + 1)] * 2)[:3, 1:].to(device)
    id_rows, ids = torch.stack([draw(size + 1, num_ids), draw(900, num_ids)]).to(device)
    ids[::3] = LAST_TOKEN
    expected = pass_batch._token_places(pool, PAGE_SIZE, rows, positions, id_rows, ids)
    monkeypatch.setattr(pass_batch, "use_kernels", lambda _tensor: True)
    got = pass_batch._token_places(pool, PAGE_SIZE, rows, positions, id_rows, ids)
    for name, one, other in zip(got._fields, got, expected, strict=True):
        assert (one is None) == (other is None), name
        assert one is None or (one.dtype == other.dtype and torch.equal(one, other)), name
    assert num_ids < 2 or (got.input_ids[::3] >= 1000).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "rope, head_dim",
    [
        (RopeConfig(theta=10000.0), 16),
        (RopeConfig(theta=1e6, rotary_factor=0.75), 32),
        (RopeConfig(theta=10000.0, rope_type="longrope", scaling=LONGROPE, attention_factor=1.3), 8),
    ],
)
def test_cosines_and_sines(device, monkeypatch, dtype, rope, head_dim):
    from ramet.srt.layers import rotary_embedding

    rotary = RotaryEmbedding(rope, head_dim, dtype, device)
    positions = torch.tensor([99, 0, 3, 17, 511, 130001], device=device)[1:]
    is_long = torch.tensor([False, True, False, False, True], device=device)
    expected = rotary.cos_sin(positions, is_long)
    monkeypatch.setattr(rotary_embedding, "use_kernels", lambda _tensor: True)
    got = rotary.cos_sin(positions, is_long)
    for one, other in zip(got[:2], expected[:2], strict=True):
        assert one.shape == other.shape and one.is_contiguous()
        torch.testing.assert_close(one, other, atol=1e-6 if dtype == torch.float32 else 8e-3, rtol=0)
