"""The kernels of attention with a sparse index against plain torch: the index's keys, scores, choice, attention."""

import dataclasses
import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from attention_case import Case
from ramet.srt.batch.batch_plan import PageWrite
from ramet.srt.batch.forward_batch_info import ForwardMode
from ramet.srt.batch.pass_tokens import PassTokens
from ramet.srt.configs.index_config import IndexTraits
from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.layers.attention.base_attn_backend import CapturedShape
from ramet.srt.layers.attention.sparse_native_backend import SparseNativeAttnBackend
from ramet.srt.layers.latent_linear import LatentHeads
from ramet.srt.layers.rotary_embedding import apply_rotary, apply_rotary_to_neighbours
from ramet.srt.mem_cache.memory_pool import ReqToPagePool
from ramet.srt.model_executor.pass_batch import make_captured_batch, token_inputs

MIXED = [(100, 1), (0, 1), (29, 6), (0, 2), (31, 1), (32, 1)]


def make_case(device, sequences, *, heads=6, rank=32, rope=8, index_heads=5, index_dim=20, top_k=32, **options):
    torch.manual_seed(0)
    index = IndexTraits(num_heads=index_heads, head_dim=index_dim, top_k=top_k, is_interleaved=False)
    return Case(device, sequences, (heads, 1, rank + rope), rank=rank, index=index, **options)


def triton(case):
    from ramet.srt.layers.attention.sparse_triton_backend import SparseTritonAttnBackend

    return SparseTritonAttnBackend(case.spec, case.pool)


def ask(case, *, whole=False):
    """Queries and weights of the index; with `whole` numbers, which come out exactly, many scores are equal."""
    index, dtype = case.latent.index, case.q.dtype
    shape = (len(case.q), index.num_heads, index.head_dim)
    if whole:
        case.pool.get_index_keys(0).round_()
        q = torch.randint(-1, 2, shape, device=case.device)
        return q.to(dtype), torch.randint(-2, 4, shape[:2], device=case.device).float()
    return torch.randn(shape, device=case.device).to(dtype), torch.randn(shape[:2], device=case.device)


def scores_of(case, q, weights):
    """float32 [num_tokens, num_slots] of the formula, for each slot that the token sees; elsewhere -inf."""
    keys, table = case.pool.get_index_keys(0).float(), case.batch.req_to_page.tolist()
    scores = torch.full((len(q), len(keys)), float("-inf"), device=case.device)
    for token, (row, position) in enumerate(
        zip(case.batch.tokens.row_of_token.tolist(), case.batch.positions.tolist(), strict=True)
    ):
        size = case.page_size
        seen = torch.tensor([table[row][at // size] * size + at % size for at in range(position + 1)])
        products = (q[token].float() @ keys[seen].T * q.shape[-1] ** -0.5).relu()
        scores[token, seen] = (weights[token][:, None] * products).sum(0)
    return scores


def check_choice(case, backend, q, weights):
    """The chosen keys have the highest scores of those that the token sees, each once."""
    backend.choose(q, weights, 0, case.batch)
    scores, top_k = scores_of(case, q, weights), case.latent.index.top_k
    for token, position in enumerate(case.batch.positions.tolist()):
        number = min(position + 1, top_k)
        chosen = backend.chosen[token, :number].long()
        assert len(chosen.unique()) == number
        wanted = scores[token].topk(number).values
        torch.testing.assert_close(scores[token][chosen].sort(descending=True).values, wanted, atol=1e-5, rtol=1e-5)
        if position >= top_k:
            assert scores[token][chosen].min() >= wanted[-1] - 1e-5


def check(case):
    """Choice and attention of the kernels, and of plain torch for what they have chosen."""
    backend, native = triton(case), SparseNativeAttnBackend(case.spec, case.pool)
    for one in (native, backend):
        one.init_forward_metadata(case.batch)
        assert one.is_sparse
        check_choice(case, one, *ask(case))
    native.chosen = backend.chosen
    layer = case.layer.layer
    case.compare(backend.forward(case.q, layer, case.batch), native.forward(case.q, layer, case.batch))
    return backend


@pytest.mark.parametrize(
    ("heads", "rank", "rope", "index_heads", "index_dim"),
    [(1, 16, 2, 1, 4), (6, 48, 8, 16, 32), (33, 20, 6, 20, 12)],
    ids=str,
)
def test_few_and_many_new_tokens_behind_prefixes(device, heads, rank, rope, index_heads, index_dim):
    sizes = {"rank": rank, "rope": rope, "index_heads": index_heads, "index_dim": index_dim}
    check(make_case(device, MIXED, heads=heads, **sizes))


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("top_k", [1, 40, 64])
def test_long_sequences_beside_short_ones(device, page_size, top_k):
    sequences = [(2, 1), (400, 1), (0, 1), (63, 1), (64, 1)]
    check(make_case(device, sequences, top_k=top_k, page_size=page_size, decode=True))


def test_the_real_sizes_in_half_precision(device):
    sizes = {"heads": 40, "rank": 512, "rope": 64, "index_heads": 64, "index_dim": 128, "top_k": 96}
    check(make_case(device, [(150, 1), (20, 1), (100, 1)], page_size=64, dtype=torch.float16, **sizes))


def test_the_keys_of_one_token_are_cut_into_pieces(device):
    backend = check(make_case(device, [(300, 1)], heads=3, top_k=130, decode=True))
    assert backend._num_pieces == 5


def test_a_few_tokens_are_scored_at_a_time(device, monkeypatch):
    from ramet.srt.layers.attention import sparse_native_backend, sparse_triton_backend

    monkeypatch.setattr(sparse_triton_backend, "SCORES_NBYTES", 4 * 128 * 5)
    monkeypatch.setattr(sparse_native_backend, "BLOCK_NBYTES", 1 << 14)
    check(make_case(device, MIXED))


def test_of_equal_scores_the_first_are_chosen(device):
    """So that a choice does not depend on how programs run."""
    case = make_case(device, [(140, 1), (3, 1)], index_heads=2, index_dim=4)
    q, weights = ask(case, whole=True)
    backend = triton(case)
    backend.init_forward_metadata(case.batch)
    check_choice(case, backend, q, weights)
    token, table = 0, case.batch.req_to_page[0].tolist()  # behind 140 others
    order = [table[at // case.page_size] * case.page_size + at % case.page_size for at in range(141)]
    scores = scores_of(case, q, weights)[token][order]
    last = scores.topk(32).values[-1]
    above = int((scores > last).sum())
    equal = (scores == last).nonzero().flatten().tolist()
    assert len(equal) > 32 - above > 0, "the case has no ties"
    wanted = sorted((scores > last).nonzero().flatten().tolist() + equal[: 32 - above])
    assert backend.chosen[token].tolist() == [order[at] for at in wanted]


def test_negative_scores_and_those_of_any_size(device):
    from ramet.srt.layers.kernels.choose_keys import choose_keys

    scores = torch.tensor([[-1e30, 3e38, -0.0, 0.0, 1e-40, -1e-40, 5.0, -5.0, float("-inf"), 2.0]], device=device)
    table = torch.arange(3, device=device)[None]
    for top_k in range(1, 10):
        chosen = torch.full((1, top_k), -1, dtype=torch.int32, device=device)
        places = torch.tensor([0], device=device), torch.tensor([9], device=device)
        choose_keys(scores, table, *places, chosen, page_size=4)
        best = [1, 6, 9, 4, 2, 3, 5, 7, 0, 8][:top_k]  # of the two zeros the first
        assert chosen.tolist() == [sorted(best)]


def best_slots(scores, table, length, top_k, page_size):
    """Of one token, by torch: of equal scores the first, in the order of their positions."""
    order = torch.where(scores == 0.0, 0.0, scores)[:length].sort(descending=True, stable=True).indices
    best = order[:top_k].sort().values
    return (table[best // page_size] * page_size + best % page_size).tolist()


@pytest.mark.parametrize(
    ("values", "top_k", "width"),
    [("distinct", 1, 1025), ("few", 1, 1281), ("equal", 100, 1601), ("few", 700, 1601), ("distinct", 700, 2048)],
)
def test_programs_that_share_keys_choose_what_torch_does(device, top_k, width, values):
    """One long sequence among short ones, some with fewer keys than are chosen; ties over the borders of parts."""
    from ramet.srt.layers.kernels.choose_keys import choose_keys, keys_of_part

    lengths = [width, 1, top_k, top_k + 1, 513, 256]
    assert width > keys_of_part(device, len(lengths), width, 256) < 513 < width
    generator = torch.Generator().manual_seed(top_k)
    scores = torch.randn(len(lengths), width, generator=generator)
    if values != "distinct":
        scores = scores.mul_(1.5).round_() if values == "few" else torch.full_like(scores, -2.5)
    for row, length in enumerate(lengths):
        scores[row, length:] = float("inf")  # what nobody sees may be anything
    table = torch.randperm(width // 8 + 1, generator=generator)[None].repeat(2, 1)
    table[1] = table[1].flip(0)
    rows = torch.tensor([1, 0, 1, 0, 1, 0])
    chosen = torch.full((len(lengths), top_k), -7, dtype=torch.int32, device=device)
    places = (one.to(device) for one in (scores, table, rows, torch.tensor(lengths) - 1))
    choose_keys(*places, chosen, page_size=8)
    for token, length in enumerate(lengths):
        wanted = best_slots(scores[token], table[rows[token]], length, top_k, 8)
        assert chosen[token].tolist() == wanted + [-7] * (top_k - len(wanted)), length


@pytest.mark.parametrize(("num_tokens", "width"), [(1, 65536), (3, 70001), (64, 65536), (1000, 262144), (9, 512)])
def test_parts_hold_all_keys_and_are_few(device, num_tokens, width):
    from ramet.srt.layers.kernels import choose_keys as kernel

    keys = kernel.keys_of_part(device, num_tokens, width, 256)
    num_parts = -(-width // keys)
    assert keys % 256 == 0 and 1 <= num_parts <= kernel.MOST_PARTS.value
    assert (num_parts > 1) == (num_tokens < 32 and width > 1024)


def test_passes_in_which_nobody_sees_more_are_cut_as_without_an_index(device):
    case = make_case(device, [(20, 1), (0, 9), (31, 1)])
    backend = triton(case)
    case.compare(case.run(backend), case.native())
    assert not backend.is_sparse and backend.num_before_long == 32
    native = SparseNativeAttnBackend(case.spec, case.pool)
    case.compare(case.run(native), case.native())


def test_a_captured_pass_reads_its_lengths_on_the_device(device):
    """What is made at the capture serves short and long sequences; the host says nothing more."""
    case = make_case(device, [(140, 1), (3, 1), (31, 1), (60, 1)], decode=True)
    pool = ReqToPagePool(4, 64, device)
    pages = [[page for page in row if page] for row in case.batch.req_to_page.tolist()]
    pool.write([PageWrite(row=row, start=0, pages=pages[row]) for row in range(4)])
    inputs = torch.zeros(3, 6, dtype=torch.int64, device=device)
    backend, shape = triton(case), CapturedShape(6, False)
    backend.init_cuda_graph_state([shape], pool.req_to_page)
    padded = case.batch.tokens.padded(6, pool.padding_row)
    inputs.copy_(torch.from_numpy(token_inputs(padded)))
    backend.init_forward_metadata_replay_cuda_graph(shape, padded, inputs[0])
    batch = make_captured_batch(pool, case.page_size, inputs, ForwardMode.DECODE)
    backend.init_forward_metadata(batch)
    q, weights = ask(case)
    case.fill(slice(0, case.page_size), 0.0)  # what pads the pass reads page 0

    def pad(x):
        return torch.cat([x, x[:2]])

    backend.choose(pad(q), pad(weights), 0, batch)
    actual = backend.forward(pad(case.q), case.layer.layer, batch)
    native = SparseNativeAttnBackend(case.spec, case.pool)
    native.init_forward_metadata(case.batch)
    native.choose(q, weights, 0, case.batch)
    case.compare(actual[:4], native.forward(case.q, case.layer.layer, case.batch))
    assert actual[4:].isfinite().all()


def test_where_no_sequence_can_have_more_keys_captured_passes_are_cut(device):
    case = make_case(device, [(20, 1)], decode=True)
    backend, shape = triton(case), CapturedShape(4, False)
    backend.init_cuda_graph_state([shape], torch.zeros(5, 8, dtype=torch.int64))  # pages of 4
    assert shape in backend._captured
    backend.init_cuda_graph_state([shape], torch.zeros(5, 9, dtype=torch.int64))
    assert backend._captures_choice


def test_long_chunks_that_see_few_keys_are_expanded_beside_others(device, monkeypatch):
    """What stands between them attends to what is chosen."""
    from ramet.srt.layers.attention import expanded_chunks
    from ramet.srt.models.latent_attention import LatentAttention

    monkeypatch.setattr(expanded_chunks, "MIN_TOKENS", 16)
    case = make_case(device, [(90, 1), (0, 20), (30, 17), (5, 3), (12, 18)], heads=5, rank=24, rope=6)
    latent = case.latent
    heads = LatentHeads(latent, 5, "kv_b_proj", dtype=torch.float32, parallel=ParallelConfig())
    heads.weight = torch.nn.Parameter(torch.randn(heads.weight.shape, device=device), requires_grad=False)
    q = torch.randn(len(case.q), 5, latent.query_dim, device=device)
    case.q[..., 24:] = q[..., latent.nope_dim :]
    heads.take_queries(q[..., : latent.nope_dim], case.q[..., :24])
    asked = ask(case)
    native = SparseNativeAttnBackend(case.spec, case.pool)
    native.init_forward_metadata(case.batch)
    native.choose(*asked, 0, case.batch)
    wanted = heads.take_results(native.forward(case.q, case.layer.layer, case.batch))

    backend = triton(case)
    backend.init_forward_metadata(case.batch)
    assert backend.is_sparse and backend.expanded.others.lens.tolist() == [1, 17, 3]  # 17 see more than 32
    backend.choose(*asked, 0, case.batch)
    case.layer.bind(backend)
    case.layer.rows = case.pool.get_kv_buffer(0)[0]
    attention = SimpleNamespace(attn=case.layer, kv_b_proj=heads, latent=latent)
    attention._attend_to_rows = functools.partial(LatentAttention._attend_to_rows, attention)
    actual = LatentAttention._attend_expanded(attention, q, backend.expanded, case.batch)
    torch.testing.assert_close(actual, wanted, atol=2e-4, rtol=2e-4)


def test_long_chunks_that_need_no_choice_are_rather_launched(device):
    backend = triton(make_case(device, [(0, 1)], top_k=4096))

    def prefers(start, new):
        return backend.prefers_launches(PassTokens(*(np.array([one]) for one in (0, start, new)), np.zeros(new)))

    assert prefers(0, 2048) and prefers(2048, 2048) and not prefers(2049, 2048) and not prefers(0, 255)


@pytest.mark.parametrize("has_queries", [True, False])
@pytest.mark.parametrize("is_interleaved", [True, False])
@pytest.mark.parametrize(("heads", "dim", "rope", "dtype"), [(3, 20, 6, torch.float32), (20, 64, 64, torch.float16)])
def test_keys_are_normed_rotated_and_stored(device, heads, dim, rope, dtype, is_interleaved, has_queries):
    from ramet.srt.layers.kernels.index_rows import store_index_keys

    num_tokens = 5
    keys = torch.randn(num_tokens, dim + 4, device=device, dtype=dtype)[:, 4:] + 1
    q = torch.randn(num_tokens, heads, dim, device=device, dtype=dtype)
    angles = torch.rand(num_tokens, 1, rope // 2, device=device) * 6
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    norm = (*torch.randn(2, dim, device=device).to(dtype), 1e-6)
    slots = torch.tensor([7, 0, 3, 9, 2], device=device)
    cache = torch.full((11, dim), 7.0, device=device, dtype=dtype)

    def rotate(x):
        turn = apply_rotary_to_neighbours if is_interleaved else apply_rotary
        return torch.cat([turn(x[..., :rope].float(), cos.float(), sin.float()), x[..., rope:].float()], -1).to(dtype)

    normed = torch.nn.functional.layer_norm(keys.float(), (dim,), norm[0].float(), norm[1].float(), 1e-6)
    wanted, turned = torch.full_like(cache, 7.0), rotate(q)
    wanted[slots] = rotate(normed[:, None])[:, 0]
    places = slots, cache
    asked = q if has_queries else None
    store_index_keys(keys, asked, cos, sin, *norm, *places, is_interleaved=is_interleaved)
    tolerance = {"atol": 6e-3, "rtol": 6e-3} if dtype == torch.float16 else {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(cache, wanted, **tolerance)
    if has_queries:
        torch.testing.assert_close(q, turned, **tolerance)


@pytest.mark.parametrize("num_tokens", [1, 3, 64, 2048])
@pytest.mark.parametrize("top_k", [1, 9, 500, 2048])
def test_pieces_hold_all_keys(device, num_tokens, top_k):
    from ramet.srt.layers.kernels.latent_attention import head_group, latent_tile
    from ramet.srt.layers.kernels.sparse_attention import MOST_PIECES, count_pieces

    number = count_pieces(num_tokens, 128, top_k, device, torch.bfloat16)
    keys = latent_tile(device, torch.bfloat16, head_group(128, torch.bfloat16), is_large=False).keys
    assert 1 <= number <= MOST_PIECES and (number - 1) * keys < top_k
    assert num_tokens < 2048 or number == 1


def test_another_layer_attends_to_the_same_choice(device):
    """Nothing of the choice is lost between layers, and a new pass begins without one that counts."""
    case = make_case(device, [(100, 1)], decode=True)
    backend = triton(case)
    backend.init_forward_metadata(case.batch)
    backend.choose(*ask(case), 0, case.batch)
    first = backend.forward(case.q, case.layer.layer, case.batch)
    again = backend.forward(case.q, dataclasses.replace(case.layer.layer, sliding_window=None), case.batch)
    assert torch.equal(first, again)
