"""Greedy tokens and log-probabilities against transformers, whatever the batching, chunking and caching."""

import pytest
import random_models as rm
from engine_harness import EngineHarness

PROMPTS = rm.random_prompts([1, 5, 17, 33, 60])
NUM_TOKENS = 14
VARIANTS = {
    "plain": {},
    "chunked, pages of one token": {"chunked_prefill_size": 7, "page_size": 1},
    "whole prompts, pages of 16": {"chunked_prefill_size": -1, "page_size": 16},
    "no prefix cache, one at a time": {"disable_radix_cache": True, "max_running_requests": 1},
    "retraction": {"max_total_tokens": 160},
}


def has_linear_layers(folder):
    return "linear_attention" in (folder / "config.json").read_text()


@pytest.fixture(scope="module", params=sorted(rm.FAMILIES))
def model(request, tmp_path_factory):
    folder = rm.make_model(tmp_path_factory.mktemp(request.param), request.param)
    return folder, rm.hf_greedy(folder, PROMPTS, NUM_TOKENS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens_equal_transformers(model, variant):
    folder, expected = model
    engine = EngineHarness(folder, **VARIANTS[variant])
    first = engine.generate(PROMPTS, max_new_tokens=NUM_TOKENS)
    assert [result.token_ids for result in first] == expected
    again = engine.generate(PROMPTS, max_new_tokens=NUM_TOKENS)
    assert [result.token_ids for result in again] == expected
    if variant == "retraction":
        assert engine.scheduler.running.num_retracted > 0 or folder.name.startswith(
            "phi3"
        )  # whose long sequences start over
    elif variant == "no prefix cache, one at a time":
        assert all(result.cached_tokens == 0 for result in again) and engine.max_batch_size == 1
    else:
        assert again[-1].cached_tokens >= 48 and engine.max_batch_size == len(PROMPTS)


@pytest.mark.parametrize("chunk", [16, -1])
def test_logprobs_equal_transformers(model, chunk):
    folder, _ = model
    engine = EngineHarness(folder, chunked_prefill_size=chunk)
    for _ in range(2):  # the second time with a warm cache, which prompt log-probabilities must go around
        results = engine.generate(PROMPTS, max_new_tokens=5, logprob_start_len=0, top=3)
        sequences = [prompt + result.token_ids for prompt, result in zip(PROMPTS, results, strict=True)]
        for ids, result, expected in zip(sequences, results, rm.hf_logprobs(folder, sequences), strict=True):
            wanted = [expected[place, token].item() for place, token in enumerate(ids[1:])]
            got = result.input_logprobs.logprobs + result.output_logprobs
            assert got[0] is None
            assert got[1:] == pytest.approx(wanted, abs=1e-4)
            ranks = result.input_logprobs.ranks
            assert ranks[0] == 0 and len(ranks) == len(result.input_logprobs.token_ids)
            assert len(ranks) < 20 or max(ranks) > 10  # tokens by chance are seldom the likeliest
            for rank, row, value in zip(ranks[1:], expected, wanted, strict=False):
                assert 1 + int((row > value + 1e-4).sum()) <= rank <= 1 + int((row > value - 1e-4).sum())
            best = expected[-2].topk(3).values.tolist()
            assert result.top_logprobs[-1] == pytest.approx(best, abs=1e-4)


@pytest.mark.parametrize("variant", [{}, {"overlap": True}, {"max_total_tokens": 100}])
def test_a_sequence_that_grows_beyond_the_first_frequencies_starts_over(tmp_path, variant):
    """Of a sequence up to 40 tokens long all keys are others than of a longer one, which transformers computes anew."""
    folder = rm.make_model(tmp_path, "phi3")
    prompts = rm.random_prompts([38, 39, 40, 41])
    prompts.append(prompts[0][:32] + prompts[3][:4])
    prompts += [prompt[:30] for prompt in prompts]  # end before they would cross
    lengths = [9] * 5 + [8] * 5
    expected = [rm.hf_greedy(folder, [prompt], n)[0] for prompt, n in zip(prompts, lengths, strict=True)]
    engine = EngineHarness(folder, **variant)
    for _ in range(2):
        engine.channel.outputs.clear()
        for index, (prompt, n) in enumerate(zip(prompts, lengths, strict=True)):
            engine.submit(str(index), prompt, max_new_tokens=n)
        results = engine.run()
        assert [results[str(index)].token_ids for index in range(10)] == expected
    if "max_total_tokens" not in variant:
        assert results["3"].cached_tokens == 40 and results["9"].cached_tokens == 28


def test_prompt_logprobs_from_a_later_position(model):
    folder, _ = model
    prompt = PROMPTS[-1]
    engine = EngineHarness(folder)
    whole = engine.generate([prompt], max_new_tokens=1, logprob_start_len=0)[0].input_logprobs
    if has_linear_layers(folder):  # whose state at that place is kept when it is asked for
        engine.generate([prompt], max_new_tokens=1, logprob_start_len=41)
    part = engine.generate([prompt], max_new_tokens=1, logprob_start_len=41)[0]
    assert part.input_logprobs.token_ids == prompt[41:]
    assert part.input_logprobs.logprobs == pytest.approx(whole.logprobs[41:], abs=1e-4)
    assert part.cached_tokens == 40


@pytest.mark.parametrize("family", ["llama3", "qwen2", "qwen3_moe", "mixtral", "olmo2", "gemma3", "glm4_moe"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_runs_and_follows_float32(tmp_path, family, dtype):
    folder = rm.make_model(tmp_path, family, dtype=dtype)
    prompts = rm.random_prompts([40])
    result = EngineHarness(folder).generate(prompts, max_new_tokens=1, logprob_start_len=0)[0]
    expected = rm.hf_logprobs(folder, prompts)[0]
    wanted = [expected[place, token].item() for place, token in enumerate(prompts[0][1:])]
    errors = [abs(a - b) for a, b in zip(result.input_logprobs.logprobs[1:], wanted, strict=True)]
    assert sum(errors) / len(errors) < 0.2


@pytest.mark.parametrize(
    "family, overrides",
    [
        ("llama2", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
        (
            "llama3",
            {"tie_word_embeddings": False, "hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3},
        ),
        ("llama2", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
        ("mistral", {"sliding_window": None, "num_key_value_heads": 4, "tie_word_embeddings": True}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
        ("qwen3", {"tie_word_embeddings": True, "attention_bias": True, "head_dim": 16}),
        ("qwen3_moe", {"num_experts": 5, "num_experts_per_tok": 1, "norm_topk_prob": False, "attention_bias": True}),
        ("qwen3_moe", {"decoder_sparse_step": 2, "mlp_only_layers": [], "num_experts_per_tok": 6}),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 9, "tie_word_embeddings": True}),
        ("olmo2", {"attention_bias": True, "tie_word_embeddings": True, "num_key_value_heads": 4}),
        ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 2, "use_sliding_window": False}),
        ("gemma3", {"layer_types": ["full_attention", "sliding_attention"] + ["full_attention"], "rope_scaling": None}),
        ("gemma3", {"attention_bias": True, "final_logit_softcapping": None, "tie_word_embeddings": False}),
        ("glm4_moe", {"n_group": 1, "topk_group": 1, "norm_topk_prob": False, "use_qk_norm": False}),
        ("minimax_m2", {"rotary_dim": None, "num_experts_per_tok": 1}),
        ("llama2", {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}),
        *((family, {}) for family in rm.COMPOSED),
        ("mixtral", {"num_local_experts": 9, "num_experts_per_tok": 4, "sliding_window": None, "hidden_act": "gelu"}),
    ],
)
@pytest.mark.parametrize("rope_spelling", ["old", "new"])
def test_configs_of_each_architecture(tmp_path, family, overrides, rope_spelling):
    folder = rm.make_model(tmp_path, family, rope_spelling=rope_spelling, max_shard_size="100KB", **overrides)
    expected = rm.hf_greedy(folder, PROMPTS[2:], 8)
    results = EngineHarness(folder, chunked_prefill_size=32).generate(PROMPTS[2:], max_new_tokens=8)
    assert [result.token_ids for result in results] == expected


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "glm4_moe", "minimax_m2"])
def test_experts_that_the_checkpoint_holds_in_one_tensor(tmp_path, family):
    folder = rm.make_model(tmp_path, family, stacked_experts=True, max_shard_size="100KB")
    expected = rm.hf_greedy(folder, PROMPTS[2:], 8)
    results = EngineHarness(folder).generate(PROMPTS[2:], max_new_tokens=8)
    assert [result.token_ids for result in results] == expected
