"""The kernels of latent attention at the sizes of published models, on a GPU, against plain torch there."""

import dataclasses
import functools
from types import SimpleNamespace

import pytest
import random_models as rm
import torch
from attention_case import Case
from engine_harness import EngineHarness
from ramet.srt.configs.latent_config import LatentTraits
from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.configs.weight_format import fp8_blocks
from ramet.srt.layers.attention.registry import choose_attn_backend
from ramet.srt.layers.latent_linear import LatentHeads, multiply_heads
from ramet.srt.layers.quantization.declare import declare_format
from ramet.srt.layers.quantization.dequantize import dequantize
from ramet.srt.layers.quantization.weight import weight_of
from ramet.srt.models.latent_attention import LatentAttention

DEVICE = torch.device("cuda", 0)
V3 = LatentTraits(q_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128, is_interleaved=True)
FLASH = LatentTraits(q_rank=768, kv_rank=512, nope_dim=192, rope_dim=64, value_dim=256, is_interleaved=True)
MIXED = [(0, 5), (300, 1), (17, 130), (4000, 1), (256, 256), (5, 1)]
DECODE = [(0, 1), (15, 1), (8191, 1), (255, 1), (999, 1)]


def triton(case, latent):
    from ramet.srt.layers.attention.latent_triton_backend import LatentTritonAttnBackend

    return LatentTritonAttnBackend(dataclasses.replace(case.spec, latent=latent), case.pool)


@pytest.mark.parametrize("heads", [8, 16, 20, 64, 128])
@pytest.mark.parametrize("sequences", [MIXED, DECODE], ids=["mixed", "decode"])
def test_attention_over_rows(monkeypatch, heads, sequences):
    from ramet.srt.layers.attention import expanded_chunks

    monkeypatch.setattr(expanded_chunks, "MIN_TOKENS", 1 << 30)
    options = {"rank": 512, "page_size": 16, "dtype": torch.bfloat16, "decode": sequences is DECODE}
    case = Case(DEVICE, sequences, (heads, 1, 576), **options)
    case.compare(case.run(triton(case, V3)), case.native())


def make_heads(latent, num_heads):
    heads = LatentHeads(latent, num_heads, "kv_b_proj", dtype=torch.bfloat16, parallel=ParallelConfig())
    weight = torch.randn(heads.weight.shape, dtype=torch.bfloat16, device=DEVICE) * 512**-0.5
    heads.weight = torch.nn.Parameter(weight, requires_grad=False)
    return heads


@pytest.mark.parametrize(("latent", "num_heads"), [(V3, 16), (V3, 128), (FLASH, 20)], ids=["16", "128", "flash"])
def test_long_chunks_over_expanded_keys_and_values(latent, num_heads):
    sequences = [(300, 1), (0, 700), (1000, 300), (17, 130), (40, 1)]
    case = Case(DEVICE, sequences, (num_heads, 1, 576), rank=512, page_size=16, dtype=torch.bfloat16)
    heads = make_heads(latent, num_heads)
    q = torch.randn(len(case.q), num_heads, latent.query_dim, dtype=torch.bfloat16, device=DEVICE)
    case.q[..., 512:] = q[..., latent.nope_dim :]
    heads.take_queries(q[..., : latent.nope_dim], case.q[..., :512])
    wanted = heads.take_results(case.native())
    backend = triton(case, latent)
    backend.init_forward_metadata(case.batch)
    assert backend.expanded is not None
    case.layer.bind(backend)
    case.layer.rows = case.pool.get_kv_buffer(0)[0]
    attention = SimpleNamespace(attn=case.layer, kv_b_proj=heads, latent=latent)
    attention._attend_to_rows = functools.partial(LatentAttention._attend_to_rows, attention)
    actual = LatentAttention._attend_expanded(attention, q, backend.expanded, case.batch)
    error = (actual.float() - wanted.float()).norm() / wanted.float().norm()
    assert error < 2e-2


@pytest.mark.parametrize("num_tokens", [1, 64, 700])
@pytest.mark.parametrize(("latent", "num_heads"), [(V3, 128), (FLASH, 20)], ids=["v3", "flash"])
def test_heads_by_an_fp8_matrix(latent, num_heads, num_tokens):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("a GPU without fp8")
    heads = LatentHeads(latent, num_heads, "kv_b_proj", dtype=torch.bfloat16, parallel=ParallelConfig())
    declare_format(heads, "weight", fp8_blocks(128, 128, multiplies_fp8=True), DEVICE)
    for name, parameter in list(heads.named_parameters()):
        values = torch.rand(parameter.shape, device=DEVICE) + 0.5 if "scale" in name else torch.randn(
            parameter.shape, device=DEVICE
        )  # fmt: skip
        setattr(heads, name, torch.nn.Parameter(values.to(parameter.dtype), requires_grad=False))
    weight = weight_of(heads, "weight")
    matrices = dequantize(weight, torch.bfloat16).view(num_heads, -1, 512)
    nope = latent.nope_dim
    x = torch.randn(num_tokens, num_heads, 512, dtype=torch.bfloat16, device=DEVICE)
    out = torch.empty(num_tokens, num_heads, latent.value_dim, dtype=torch.bfloat16, device=DEVICE)
    multiply_heads(x, weight, out, first_row=nope, rows_are_outputs=True)
    wanted = torch.einsum("nhi,hoi->nho", x.float(), matrices[:, nope:].float())
    assert (out.float() - wanted).norm() / wanted.norm() < 1e-2
    q = torch.randn(num_tokens, num_heads, nope, dtype=torch.bfloat16, device=DEVICE)
    queries = torch.empty(num_tokens, num_heads, 576, dtype=torch.bfloat16, device=DEVICE)
    multiply_heads(q, weight, queries[..., :512], first_row=0, rows_are_outputs=False)
    wanted = torch.einsum("nhi,hio->nho", q.float(), matrices[:, :nope].float())
    assert (queries[..., :512].float() - wanted).norm() / wanted.norm() < 1e-2


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "no graphs"])
@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe_lite"])
def test_an_engine_with_long_chunks_and_cache_hits(tmp_path, family, graphs):
    """In half precision, by rows and by expanded keys: as likely tokens as torch_native chooses."""
    folder = rm.make_model(tmp_path, family, dtype="bfloat16", max_position_embeddings=2048)
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
            assert len(theirs) == 12 and theirs == pytest.approx(best, abs=0.3)


@pytest.mark.parametrize("name", ["flash_mla", "flashinfer"])
@pytest.mark.parametrize("sequences", [MIXED, DECODE], ids=["mixed", "decode"])
@pytest.mark.parametrize("heads", [16, 128])
def test_attention_by_a_library(name, heads, sequences):
    """Launched, and measured in a graph beside Ramet's kernels."""
    from ramet.srt.layers.attention.rows.choice import Trial

    options = {"rank": 512, "page_size": 64, "dtype": torch.bfloat16, "decode": sequences is DECODE}
    case = Case(DEVICE, sequences, (heads, 1, 576), **options)
    try:
        backend = choose_attn_backend(name, case.spec)(case.spec, case.pool)
    except ValueError as error:
        pytest.skip(str(error))
    case.check_made(backend)
    if sequences is DECODE:
        assert min(Trial(case.spec).compare(backend.library)) > 0


@pytest.mark.parametrize("name", ["flash_mla", "flashinfer"])
def test_an_engine_whose_graphs_hold_a_library(tmp_path, name):
    sizes = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "max_position_embeddings": 2048}
    folder = rm.make_model(tmp_path, "deepseek_v3", dtype="bfloat16", **sizes)
    prompts = rm.random_prompts([5, 300, 40, 450])
    options = {"device": "cuda", "max_total_tokens": 8192, "chunked_prefill_size": 400, "page_size": 64}
    native = EngineHarness(folder, attention_backend="torch_native", disable_cuda_graph=True, **options)
    try:
        engine = EngineHarness(folder, overlap=True, attention_backend=name, **options)
    except ValueError as error:
        pytest.skip(str(error))
    assert engine.runner.attn_backend.library.name == name and engine.runner.graph_runner is not None
    for _ in range(2):
        engine.channel.outputs.clear()
        results = engine.generate(prompts, max_new_tokens=12)
        whole = [prompt + result.token_ids for prompt, result in zip(prompts, results, strict=True)]
        native.channel.outputs.clear()
        scores = native.generate(whole, max_new_tokens=1, logprob_start_len=0, top=1)
        for prompt, score in zip(prompts, scores, strict=True):
            theirs = score.input_logprobs.logprobs[len(prompt) :]
            best = [top[0] for top in score.input_logprobs.top_logprobs[len(prompt) :]]
            assert max(a - b for a, b in zip(best, theirs, strict=True)) < 0.3
