"""The kernels of latent attention against plain torch: pieces, the rows that are kept, products with kv_b_proj."""

import dataclasses
import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from attention_case import Case
from ramet.srt.batch.pass_tokens import PassTokens
from ramet.srt.configs.latent_config import LatentTraits
from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.configs.weight_format import fp8_blocks, fp8_rows
from ramet.srt.layers.latent_linear import LatentHeads
from ramet.srt.layers.parameter import declare_weight, shard_box
from ramet.srt.layers.quantization.declare import declare_format
from ramet.srt.layers.quantization.dequantize import dequantize
from ramet.srt.layers.quantization.weight import weight_of
from ramet.srt.layers.rotary_embedding import apply_rotary, apply_rotary_to_neighbours


def check(case):
    from ramet.srt.layers.attention.latent_triton_backend import LatentTritonAttnBackend

    case.check(LatentTritonAttnBackend)


@pytest.mark.parametrize(
    ("heads", "rank", "rope"),
    [(1, 16, 2), (6, 48, 8), (16, 64, 16), (20, 40, 12), (33, 20, 6)],
    ids=str,
)
def test_few_and_many_new_tokens_behind_prefixes(device, heads, rank, rope):
    """Heads that fill a tile, leave rows of it empty, or need two; ranks that are no power of two."""
    sequences = [(140, 1), (0, 1), (17, 3), (9, 12), (0, 5)]
    check(Case(device, sequences, (heads, 1, rank + rope), rank=rank))


@pytest.mark.parametrize("page_size", [1, 16])
def test_long_sequences_beside_short_ones(device, page_size):
    """The long ones are split into pieces, the short ones not."""
    sequences = [(2, 1), (700, 1), (0, 1), (300, 1)]
    check(Case(device, sequences, (6, 1, 40), rank=32, page_size=page_size, decode=True))


def test_a_prefix_that_many_sequences_share(device):
    sequences = [(20, 1), *((256 + length, 1) for length in (0, 30, 90, 4)), (300, 1)]
    check(Case(device, sequences, (3, 1, 40), rank=32, page_size=16, decode=True, shared=[(1, 4, 256)]))


def test_the_real_size_in_half_precision(device):
    check(Case(device, [(40, 1), (20, 2)], (40, 1, 576), rank=512, page_size=64, dtype=torch.float16))


def test_long_chunks_are_split_too(device):
    check(Case(device, [(1200, 5), (90, 1)], (5, 1, 24), rank=16, page_size=32))


@pytest.mark.parametrize("is_interleaved", [True, False])
@pytest.mark.parametrize(("heads", "rank", "rope", "dtype"), [(3, 20, 6, torch.float32), (17, 64, 16, torch.float16)])
def test_rows_are_normed_rotated_and_stored(device, heads, rank, rope, dtype, is_interleaved):
    from ramet.srt.layers.kernels.latent_rows import store_rows

    num_tokens, nope, other = 5, 10, 12
    rows = torch.randn(num_tokens, other + rank + rope, device=device, dtype=dtype)[:, other:]
    q = torch.randn(num_tokens, heads, nope + rope, device=device, dtype=dtype)
    angles = torch.rand(num_tokens, 1, rope // 2, device=device) * 6
    cos, sin, weight = angles.cos().to(dtype), angles.sin().to(dtype), torch.randn(rank, device=device).to(dtype)
    slots = torch.tensor([7, 0, 3, 9, 2], device=device)
    cache = torch.full((11, 1, rank + rope), 7.0, device=device, dtype=dtype)
    queries = torch.full((num_tokens, heads, rank + rope), 7.0, device=device, dtype=dtype)
    store_rows(rows, q, cos, sin, weight, 1e-6, slots, cache, queries, is_interleaved=is_interleaved)

    rotate = apply_rotary_to_neighbours if is_interleaved else apply_rotary
    tolerance = {"atol": 4e-3, "rtol": 4e-3} if dtype == torch.float16 else {"atol": 1e-5, "rtol": 1e-5}
    normed = torch.nn.functional.rms_norm(rows[:, :rank].float(), (rank,), weight.float(), 1e-6)
    turned = rotate(rows[:, None, rank:].float(), cos.float(), sin.float())
    wanted = torch.full_like(cache, 7.0)
    wanted[slots] = torch.cat((normed[:, None], turned), dim=-1).to(dtype)
    torch.testing.assert_close(cache, wanted, **tolerance)
    turned = rotate(q[..., nope:].float(), cos.float(), sin.float()).to(dtype)
    torch.testing.assert_close(queries[..., rank:], turned, **tolerance)
    assert (queries[..., :rank] == 7).all()


@pytest.mark.parametrize("num_tokens", [1, 20, 70])
@pytest.mark.parametrize(("heads", "nope", "value", "rank", "blocks"), [(3, 20, 28, 40, 16), (2, 64, 48, 80, 0)])
def test_each_head_with_its_part_of_an_fp8_matrix(device, num_tokens, heads, nope, value, rank, blocks):
    """With scales of blocks that begin in the middle of a head, and with one for each row."""
    from ramet.srt.layers.latent_linear import multiply_heads

    if device.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("a GPU without fp8")
    num_rows = heads * (nope + value)
    first = blocks // 2  # the rank's rows begin within a block
    holder = torch.nn.Module()
    box = shard_box("w.weight", (first + num_rows, rank), 0, first, first + num_rows)
    holder.weight = declare_weight((num_rows, rank), torch.float32, [box])
    declare_format(holder, "weight", fp8_blocks(blocks, blocks) if blocks else fp8_rows(), device)
    grids = {"weight": torch.randn(num_rows, rank).clamp(-1.7, 1.7)}  # what the interpreter rounds as others do
    for name, parameter in list(holder.named_parameters()):
        numbers = grids.get(name, torch.rand(parameter.shape) + 0.5)
        setattr(holder, name, torch.nn.Parameter(numbers.to(parameter.dtype).to(device), requires_grad=False))
    weight = weight_of(holder, "weight")
    matrices = dequantize(weight, torch.float32).view(heads, nope + value, rank)
    for first_row, size, is_output in ((0, nope, False), (nope, value, True)):
        part = matrices[:, first_row : first_row + size]
        x = torch.randn(num_tokens, heads, rank if is_output else size, device=device)
        out = torch.empty(num_tokens, heads, (size if is_output else rank) + 3, device=device)[..., 3:]
        multiply_heads(x, weight, out, first_row=first_row, rows_are_outputs=is_output)
        wanted = torch.einsum("nhi,hoi->nho" if is_output else "nhi,hio->nho", x, part)
        torch.testing.assert_close(out, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sequences", [[(0, 40)], [(20, 1), (37, 33), (0, 3), (0, 16), (15, 1)]], ids=str)
@pytest.mark.parametrize("nbytes", [1, 1 << 20])
def test_chunks_over_expanded_keys_and_values(device, monkeypatch, sequences, nbytes):
    """They give what attention over rows gives, whatever stands between them and however many heads go at a time."""
    from ramet.srt.layers.attention import expanded_chunks
    from ramet.srt.layers.attention.latent_triton_backend import LatentTritonAttnBackend
    from ramet.srt.models.latent_attention import LatentAttention

    monkeypatch.setattr(expanded_chunks, "MIN_TOKENS", 16)
    monkeypatch.setattr(expanded_chunks, "EXPANDED_NBYTES", nbytes)
    latent = LatentTraits(q_rank=None, kv_rank=24, nope_dim=20, rope_dim=6, value_dim=18, is_interleaved=True)
    case = Case(device, sequences, (5, 1, 30), rank=24)
    heads = LatentHeads(latent, 5, "kv_b_proj", dtype=torch.float32, parallel=ParallelConfig())
    heads.weight = torch.nn.Parameter(torch.randn(heads.weight.shape, device=device), requires_grad=False)
    q = torch.randn(len(case.q), 5, latent.query_dim, device=device)
    case.q[..., 24:] = q[..., 20:]
    heads.take_queries(q[..., :20], case.q[..., :24])
    wanted = heads.take_results(case.native())

    backend = LatentTritonAttnBackend(dataclasses.replace(case.spec, latent=latent), case.pool)
    backend.init_forward_metadata(case.batch)
    case.layer.bind(backend)
    case.layer.rows = case.pool.get_kv_buffer(0)[0]
    attention = SimpleNamespace(attn=case.layer, kv_b_proj=heads, latent=latent)
    attention._attend_to_rows = functools.partial(LatentAttention._attend_to_rows, attention)
    actual = LatentAttention._attend_expanded(attention, q, backend.expanded, case.batch)
    torch.testing.assert_close(actual, wanted, atol=2e-4, rtol=2e-4)


def test_long_chunks_behind_many_keys_are_rather_launched(device):
    """Graphs hold attention over rows alone; every rank must come to the same conclusion."""
    from ramet.srt.layers.attention.latent_triton_backend import LatentTritonAttnBackend

    latent = LatentTraits(q_rank=None, kv_rank=16, nope_dim=8, rope_dim=8, value_dim=8, is_interleaved=True)
    case = Case(device, [(0, 1)], (2, 1, 24), rank=16)
    backend = LatentTritonAttnBackend(dataclasses.replace(case.spec, latent=latent), case.pool)
    assert backend.prefers_alike

    def prefers(start, new):
        return backend.prefers_launches(PassTokens(*(np.array([one]) for one in (0, start, new)), np.zeros(new)))

    assert prefers(0, 2048) and prefers(8192, 256) and not prefers(0, 256) and not prefers(50000, 255)
