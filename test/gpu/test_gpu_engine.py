"""The engine on a GPU against transformers on the same GPU, and its attention backends against each other."""

import packed_models as pm
import pytest
import random_models as rm
import torch
from engine_harness import EngineHarness
from fp8_models import write_fp8, write_plain
from ramet.srt.batch.batch_plan import Pooling

PROMPTS = rm.random_prompts([1, 5, 17, 33, 60])
VARIANTS = {
    "graphs and overlap": {"overlap": True},
    "without graphs": {"disable_cuda_graph": True},
    "torch_native": {"attention_backend": "torch_native"},
}
# Rows that no tile of a kernel ends with.
SIZES = {
    "llama3": {"intermediate_size": 80},
    "mixtral": {"intermediate_size": 80},
    "qwen3_moe": {"intermediate_size": 80, "moe_intermediate_size": 48},
    "phi3": {"intermediate_size": 80, "rope_scaling": None},
}

PACKED = {
    "int4": pm.ct_packed(has_zeros=True),
    "int8": pm.ct_int8(),
    "gptq": pm.gptq(),
    "gptq in any order": pm.gptq(desc_act=True),
    "awq": pm.awq(),
    "mxfp4": pm.mxfp4(),
    "nvfp4": pm.nvfp4("modelopt"),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", [*sorted(rm.FAMILIES), "qwen3_vl_moe"])  # whose experts are turned round
def test_greedy_tokens_equal_transformers(tmp_path, family, variant):
    folder = rm.make_model(tmp_path, family)
    expected = rm.hf_greedy(folder, PROMPTS, 14)
    engine = EngineHarness(folder, device="cuda", **VARIANTS[variant])
    for _ in range(2):
        assert [result.token_ids for result in engine.generate(PROMPTS, max_new_tokens=14)] == expected


@pytest.mark.parametrize("family", ["llama3", "gpt_oss"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_cache_in_fp8_gives_what_it_gives_on_a_cpu(tmp_path, family, variant):
    """But for what another rounding of a key makes of a few."""
    folder = rm.make_model(tmp_path, family)
    options = {"dtype": "float32", "kv_cache_dtype": "fp8_e4m3"}
    expected, *results = (
        engine.generate(PROMPTS, max_new_tokens=1, logprob_start_len=0)
        for engine in (
            EngineHarness(folder, device="cpu", **options),
            EngineHarness(folder, device="cuda", **options, **VARIANTS[variant]),
        )
    )
    for got, wanted in zip(results[0], expected, strict=True):
        differences = torch.tensor(got.input_logprobs.logprobs[1:]) - torch.tensor(wanted.input_logprobs.logprobs[1:])
        assert not len(differences) or differences.abs().median() < 1e-2


@pytest.mark.parametrize("variant", VARIANTS)
def test_gpt_oss_in_mxfp4(tmp_path, variant):
    folder, plain = pm.write_gpt_oss(rm.make_model(tmp_path / "m", "gpt_oss", dtype="bfloat16"), tmp_path / "mxfp4")
    engine = EngineHarness(folder, device="cuda", dtype="float32", **VARIANTS[variant])
    expected = rm.hf_greedy(plain, PROMPTS, 8)
    assert [result.token_ids for result in engine.generate(PROMPTS, max_new_tokens=8)] == expected


@pytest.mark.parametrize("variant", VARIANTS)
def test_embeddings_equal_transformers(tmp_path, variant):
    folder = rm.make_embedding_model(tmp_path)
    expected = torch.nn.functional.normalize(torch.stack(rm.hf_hidden_states(folder, PROMPTS)), dim=-1)
    engine = EngineHarness(folder, device="cuda", chunked_prefill_size=16, **VARIANTS[variant])
    for _ in range(2):
        results = engine.generate(PROMPTS, pooling=Pooling(normalize=True))
        vectors = torch.stack([torch.tensor(result.vector) for result in results])
        torch.testing.assert_close(vectors, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_labels_beside_generation(tmp_path, variant):
    folder = rm.make_model(tmp_path, "qwen3")
    expected = [whole[-1, [7, 300]] for whole in rm.hf_logprobs(folder, PROMPTS)]
    engine = EngineHarness(folder, device="cuda", **VARIANTS[variant])
    engine.submit("generated", PROMPTS[2], max_new_tokens=14)
    engine.step()
    for index, prompt in enumerate(PROMPTS):
        engine.submit(str(index), prompt, pooling=Pooling(label_token_ids=[7, 300]))
    results = engine.run()
    assert results["generated"].token_ids == rm.hf_greedy(folder, PROMPTS[2:3], 14)[0]
    for index, logprobs in enumerate(expected):
        torch.testing.assert_close(torch.tensor(results[str(index)].vector), logprobs, atol=1e-3, rtol=0)


def test_logits_of_a_larger_model_agree_to_bfloat16_rounding(tmp_path):
    """A model wide enough for the tiles that real models take."""
    from transformers import AutoModelForCausalLM

    shape = {"hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 16, "num_key_value_heads": 8,
             "head_dim": 128, "num_hidden_layers": 4, "vocab_size": 32000}  # fmt: skip
    folder = rm.make_model(tmp_path, "qwen3", dtype="bfloat16", **shape)
    engine = EngineHarness(folder, device="cuda", page_size=16, overlap=True)
    prompts = rm.random_prompts([300, 40], vocab_size=32000)
    results = engine.generate(prompts, max_new_tokens=20, logprob_start_len=0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").cuda()
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager").cuda()
    for prompt, result in zip(prompts, results, strict=True):
        ids = torch.tensor([prompt + result.token_ids], device="cuda")
        with torch.inference_mode():
            exact, rounded = (
                m(ids).logits[0].float().log_softmax(-1)[:-1].gather(1, ids[0, 1:, None]).squeeze(1)
                for m in (model, half)
            )
        ours = torch.tensor(result.input_logprobs.logprobs[1:] + result.output_logprobs, device="cuda")
        error, theirs = (ours - exact).abs().mean().item(), (rounded - exact).abs().mean().item()
        assert error < 1.5 * theirs + 1e-3, f"mean error {error:.2e}, transformers in bfloat16 {theirs:.2e}"


@pytest.mark.parametrize("temperature, top_p, top_k", [(0.8, 0.9, -1), (1.0, 1.0, 40), (1.0, 1.0, -1)])
def test_seeded_sampling_does_not_depend_on_the_batch(tmp_path, temperature, top_p, top_k):
    folder = rm.make_model(tmp_path, "llama3")
    engine = EngineHarness(folder, device="cuda", overlap=True)
    params = {"max_new_tokens": 10, "temperature": temperature, "top_p": top_p, "top_k": top_k, "sampling_seed": 7}
    together = [result.token_ids for result in engine.generate(PROMPTS[1:], **params)]
    assert together == [engine.generate([prompt], **params)[0].token_ids for prompt in PROMPTS[1:]]


def test_a_prompt_longer_than_every_tile(tmp_path):
    folder = rm.make_model(tmp_path, "mistral")
    prompts = rm.random_prompts([400, 3, 290])
    engine = EngineHarness(folder, device="cuda", max_total_tokens=4096, chunked_prefill_size=150)
    assert [r.token_ids for r in engine.generate(prompts, max_new_tokens=6)] == rm.hf_greedy(folder, prompts, 6)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("quantization", [None, "fp8"])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_experts_of_every_type_decode_in_graphs(tmp_path, family, dtype, quantization):
    """The log-probabilities of the tokens that the graphs chose are those of passes without graphs."""
    folder = rm.make_model(tmp_path, family, dtype=dtype, **SIZES[family])
    tokens, logprobs = [], []
    for variant in ("graphs and overlap", "without graphs"):
        engine = EngineHarness(folder, device="cuda", quantization=quantization, **VARIANTS[variant])
        assert (engine.runner.graph_runner is None) == (variant == "without graphs")
        result = engine.generate(PROMPTS[-1:], max_new_tokens=8, logprob_start_len=0)[0]
        tokens.append(result.token_ids)
        logprobs.append(result.input_logprobs.logprobs[1:] + result.output_logprobs)
    assert tokens[0] == tokens[1]
    assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-4 if dtype == "float32" else 0.05)


@pytest.mark.parametrize("family", ["llama3", "qwen3_moe", "mixtral"])
def test_fp8_on_the_gpu_follows_the_exact_model(tmp_path, family):
    """Such random models enlarge every error: on a CPU, which rounds the weights alone, it is up to 0.45."""
    folder = rm.make_model(tmp_path, family, dtype="bfloat16", **SIZES[family])
    prompts = rm.random_prompts([40] * 3)
    values = []
    for flags in ({"device": "cuda", "quantization": "fp8"}, {"device": "cpu", "dtype": "float32"}):
        results = EngineHarness(folder, **flags).generate(prompts, max_new_tokens=1, logprob_start_len=0)
        values.append(torch.tensor([value for result in results for value in result.input_logprobs.logprobs[1:]]))
    fp8, exact = values
    assert (fp8 - exact).norm() / (exact - exact.mean()).norm() < 0.7


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama3", "qwen3_moe"])
@pytest.mark.parametrize("kind", ["blocks", "ue8m0"])
def test_fp8_blocks_are_multiplied_as_the_plain_weights(tmp_path, family, dtype, kind):
    """With graphs and without, and with blocks that no tile of a kernel ends with."""
    source = rm.make_model(tmp_path / "source", family, dtype=dtype, **SIZES[family])
    scale_dtype = torch.float8_e8m0fnu if kind == "ue8m0" else torch.float32
    folder = write_fp8(source, tmp_path / "fp8", "blocks", block=(24, 40), scale_dtype=scale_dtype)
    check_as_plain(folder, write_plain(folder, tmp_path / "plain", (24, 40)), dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama3", "qwen3_moe", "phi3"])
@pytest.mark.parametrize("kind", PACKED)
def test_packed_weights_are_multiplied_as_the_plain_ones(tmp_path, family, dtype, kind):
    source = rm.make_model(tmp_path / "source", family, dtype=dtype, **SIZES[family])
    folder, plain = pm.write(source, tmp_path / "packed", PACKED[kind])
    check_as_plain(folder, plain, dtype)


def check_as_plain(folder, plain, dtype):
    values = []
    for path, variant in ((plain, "without graphs"), (folder, "without graphs"), (folder, "graphs and overlap")):
        engine = EngineHarness(path, device="cuda", dtype=dtype, **VARIANTS[variant])
        assert (engine.runner.graph_runner is None) == (variant == "without graphs")
        results = engine.generate(PROMPTS, max_new_tokens=8, logprob_start_len=0)
        values.append([(r.token_ids, r.input_logprobs.logprobs[1:] + r.output_logprobs) for r in results])
    exact, *ours = values
    for result in ours:
        if dtype == "float32":
            assert [tokens for tokens, _ in result] == [tokens for tokens, _ in exact]
        for (_, logprobs), (_, expected), prompt in zip(result, exact, PROMPTS, strict=True):
            count = len(logprobs) if dtype == "float32" else len(prompt) - 1  # rounded sums may choose another token
            tolerance = 1e-3 if dtype == "float32" else 0.3
            assert logprobs[:count] == pytest.approx(expected[:count], abs=tolerance)
