"""The engine on a GPU against transformers on the same GPU, and its attention backends against each other."""

import pytest
import random_models as rm
import torch
from engine_harness import EngineHarness

PROMPTS = rm.random_prompts([1, 5, 17, 33, 60])
VARIANTS = {
    "graphs and overlap": {"overlap": True},
    "without graphs": {"disable_cuda_graph": True},
    "torch_native": {"attention_backend": "torch_native"},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", sorted(rm.FAMILIES))
def test_greedy_tokens_equal_transformers(tmp_path, family, variant):
    folder = rm.make_model(tmp_path, family)
    expected = rm.hf_greedy(folder, PROMPTS, 14)
    engine = EngineHarness(folder, device="cuda", **VARIANTS[variant])
    for _ in range(2):
        assert [result.token_ids for result in engine.generate(PROMPTS, max_new_tokens=14)] == expected


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
