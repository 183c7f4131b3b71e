"""The kernels of attention with a sparse index at the sizes of published models, on a GPU, against torch there."""

import numpy as np
import pytest
import random_models as rm
import torch
from attention_case import Case
from engine_harness import EngineHarness
from ramet.srt.batch.batch_plan import PageWrite
from ramet.srt.batch.forward_batch_info import ForwardMode
from ramet.srt.batch.pass_tokens import PassTokens
from ramet.srt.configs.index_config import IndexTraits
from ramet.srt.layers.attention.base_attn_backend import CapturedShape
from ramet.srt.layers.attention.sparse_native_backend import SparseNativeAttnBackend
from ramet.srt.mem_cache.memory_pool import ReqToPagePool
from ramet.srt.model_executor.pass_batch import make_captured_batch, token_inputs

DEVICE = torch.device("cuda", 0)
MIXED = [(0, 5), (3000, 1), (17, 130), (2040, 20), (9000, 70), (5, 1)]
DECODE = [(0, 1), (15, 1), (40000, 1), (2047, 1), (2048, 1), (5000, 1)]
V32 = IndexTraits(num_heads=64, head_dim=128, top_k=2048, is_interleaved=False)
GLM = IndexTraits(num_heads=32, head_dim=128, top_k=2048, is_interleaved=True)


def make_case(sequences, heads, index, **options):
    options = {"rank": 512, "page_size": 16, "dtype": torch.bfloat16, "decode": sequences is DECODE} | options
    return Case(DEVICE, sequences, (heads, 1, 576), index=index, **options)


def triton(case):
    from ramet.srt.layers.attention.sparse_triton_backend import SparseTritonAttnBackend

    return SparseTritonAttnBackend(case.spec, case.pool)


def ask(case):
    index, num_tokens = case.latent.index, len(case.q)
    q = torch.randn(num_tokens, index.num_heads, index.head_dim, device=DEVICE).to(case.q.dtype)
    return q, torch.randn(num_tokens, index.num_heads, device=DEVICE)


def check_choice(case, mine, theirs):
    """Rounding decides between the last ones alone: nearly all are the same."""
    counts = (case.batch.positions + 1).clamp(max=case.latent.index.top_k).tolist()
    for token, count in enumerate(counts):
        chosen, wanted = (one[token, :count].sort().values for one in (mine, theirs))
        assert len(chosen.unique()) == count
        assert torch.isin(chosen, wanted).sum() >= count - max(2, count // 500), token


@pytest.mark.parametrize(("heads", "index"), [(128, V32), (16, V32), (64, GLM), (8, GLM)], ids=str)
@pytest.mark.parametrize("sequences", [MIXED, DECODE], ids=["mixed", "decode"])
def test_choice_and_attention(heads, index, sequences):
    case = make_case(sequences, heads, index)
    backend, native = triton(case), SparseNativeAttnBackend(case.spec, case.pool)
    q, weights = ask(case)
    for one in (backend, native):
        one.init_forward_metadata(case.batch)
        one.choose(q, weights, 0, case.batch)
    check_choice(case, backend.chosen, native.chosen)
    native.chosen = backend.chosen
    layer = case.layer.layer
    case.compare(backend.forward(case.q, layer, case.batch), native.forward(case.q, layer, case.batch))


def test_a_graph_serves_passes_of_any_lengths():
    """Captured over padding, replayed for sequences that see less and more than are chosen."""
    case = make_case(DECODE, 16, V32)
    pool = ReqToPagePool(8, 4096, DEVICE)
    pages = [[page for page in row if page] for row in case.batch.req_to_page.tolist()]
    pool.write([PageWrite(row=row, start=0, pages=pages[row]) for row in range(len(pages))])
    case.fill(slice(0, case.page_size), 0.0)
    backend, shape = triton(case), CapturedShape(8, False)
    backend.init_cuda_graph_state([shape], pool.req_to_page)
    inputs = torch.zeros(3, 8, dtype=torch.int64, device=DEVICE)
    q, weights, queries = (torch.zeros(8, *part.shape[1:], dtype=part.dtype, device=DEVICE)
                           for part in (*ask(case), case.q))  # fmt: skip

    def prepare(tokens):
        inputs.copy_(torch.from_numpy(token_inputs(tokens)))
        backend.init_forward_metadata_replay_cuda_graph(shape, tokens, inputs[0])

    def run():
        batch = make_captured_batch(pool, case.page_size, inputs, ForwardMode.DECODE)
        backend.init_forward_metadata(batch)
        backend.choose(q, weights, 0, batch)
        return backend.forward(queries, case.layer.layer, batch)

    prepare(PassTokens.padding(pool.padding_row, [1] * 8))
    stream = torch.cuda.Stream(DEVICE)
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for number in (len(DECODE), 2):
        tokens = case.batch.tokens.part(slice(0, number)) if number < len(DECODE) else case.batch.tokens
        prepare(tokens.padded(8, pool.padding_row))
        new = *ask(case), case.q
        for fixed, part in zip((q, weights, queries), new, strict=True):
            fixed.zero_()
            fixed[:number] = part[:number]
        graph.replay()
        native = SparseNativeAttnBackend(case.spec, case.pool)
        native.init_forward_metadata(case.batch)
        native.chosen = torch.zeros((len(DECODE), V32.top_k), dtype=torch.int32, device=DEVICE)
        native.chosen[:number] = backend.chosen[:number]
        wanted = native.forward(case.q, case.layer.layer, case.batch)
        case.compare(out[:number], wanted[:number])


def choice_case(lengths, width, values="distinct"):
    """Scores of tokens that see so many keys, with what says where these are."""
    scores = torch.randn(len(lengths), width, device=DEVICE)
    if values != "distinct":
        scores = scores.mul_(3).round_() if values == "few" else torch.full_like(scores, 1.5)
    table = torch.arange(width // 64, device=DEVICE).flip(0)[None].contiguous()
    rows = torch.zeros(len(lengths), dtype=torch.int64, device=DEVICE)
    return scores, table, rows, torch.tensor(lengths, device=DEVICE) - 1


def check_chosen(chosen, scores, table, lengths, top_k):
    """As torch sorts them: of equal scores the first, in the order of their positions."""
    for place, length in enumerate(lengths):
        count = min(top_k, length)
        best = scores[place, :length].sort(descending=True, stable=True).indices[:count].sort().values
        assert torch.equal(chosen[place, :count].long(), table[0, best // 64] * 64 + best % 64), length


@pytest.mark.parametrize("values", ["distinct", "few", "equal"])
@pytest.mark.parametrize("repeats", [1, 20, 150], ids=["few tokens", "some tokens", "many tokens"])
@pytest.mark.parametrize("number", [1, 63, 2048])
def test_a_choice_among_many_scores_is_exact(number, repeats, values):
    """Of both signs and with ties, with lengths on both sides of the number, by one program and by several."""
    from ramet.srt.layers.kernels.choose_keys import choose_keys

    lengths = [1, number, number + 1, 5000, 131072] * repeats
    scores, *places = choice_case(lengths, 131072, values)
    chosen = torch.zeros(len(lengths), number, dtype=torch.int32, device=DEVICE)
    choose_keys(scores, *places, chosen, page_size=64)
    check_chosen(chosen, scores, places[0], lengths, number)


def test_a_graph_chooses_for_any_lengths_and_the_choice_of_one_of_65536_takes_little_time():
    """No more than a few times what reading the scores from memory five times and five launches take."""
    from ramet.srt.layers.kernels.choose_keys import choose_keys

    first, then = [65536, 1, 2049, 30000], [3, 65536, 65535, 2048]
    scores, table, rows, positions = choice_case(first, 65536)
    chosen = torch.zeros(4, 2048, dtype=torch.int32, device=DEVICE)

    def run():
        choose_keys(scores, table, rows, positions, chosen, page_size=64)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for lengths in (first, then):
        positions.copy_(torch.tensor(lengths) - 1)
        scores.normal_()
        graph.replay()
        check_chosen(chosen, scores, table, lengths, 2048)
    times = []
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    assert sorted(times)[10] < 0.1, "milliseconds"


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "no graphs"])
@pytest.mark.parametrize("family", ["deepseek_v32", "glm_moe_dsa"])
def test_an_engine_with_long_chunks_and_cache_hits(tmp_path, family, graphs):
    """In half precision, with passes that choose and passes that don't: as likely tokens as torch_native chooses."""
    folder = rm.make_model(tmp_path, family, dtype="bfloat16", max_position_embeddings=2048, index_topk=64)
    prompts = rm.random_prompts([5, 300, 40, 450])
    options = {"device": "cuda", "max_total_tokens": 8192, "chunked_prefill_size": 400}
    engine = EngineHarness(folder, overlap=True, disable_cuda_graph=not graphs, **options)
    native = EngineHarness(folder, attention_backend="torch_native", disable_cuda_graph=True, **options)
    for _ in range(2):
        engine.channel.outputs.clear()
        results = engine.generate(prompts, max_new_tokens=12)
        whole = [prompt + result.token_ids for prompt, result in zip(prompts, results, strict=True)]
        native.channel.outputs.clear()
        for prompt, score in zip(prompts, native.generate(whole, max_new_tokens=1, logprob_start_len=0, top=1),
                                 strict=True):  # fmt: skip
            theirs = score.input_logprobs.logprobs[len(prompt) :]
            best = [top[0] for top in score.input_logprobs.top_logprobs[len(prompt) :]]
            # A choice that another rounding changes moves a few log-probabilities further.
            gaps = np.array(best) - np.array(theirs)
            assert len(gaps) == 12 and np.median(gaps) < 0.05 and gaps.max() < 1.0
