"""Each family's traits by the layers' kernels, which a model takes on a GPU, against its own torch code."""

import pytest
import random_models as rm
import torch
from ramet.srt.layers import activation, fused_experts, grouped_linear, layernorm, moe
from ramet.srt.layers.attention import expanded_chunks, latent_attention, radix_attention
from ramet.srt.models import sparse_index
from rank_threads import RankThreads

# Each with what of it matters to few tokens.
FAMILIES = {
    "gemma2": {"sliding_window": 3},
    "gemma3": {"sliding_window": 3},
    "glm4_moe": {},
    "minimax_m2": {},
    "gpt_oss": {"sliding_window": 3},
    "ministral3": {},
    "qwen2_moe": {"mlp_only_layers": [1]},
    "phi3": {"original_max_position_embeddings": 5},
    "deepseek_v3": {},
    "glm_moe_dsa": {"index_topk": 4, "index_skip_topk_offset": 1, "mlp_layer_types": ["dense", "sparse"]},
    "smollm3": {"no_rope_layers": [1, 0], "use_sliding_window": False},
}
SEQUENCES = rm.random_prompts([3, 7])


@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_give_what_torch_gives(monkeypatch, tmp_path, device, family):
    if device.type == "cuda":
        pytest.skip("test/gpu runs whole models there")
    folder = rm.make_model(tmp_path, family, num_hidden_layers=2, **FAMILIES[family])
    ranks = RankThreads(monkeypatch, folder, 1)
    expected = ranks.logprobs(SEQUENCES, 64)
    ranks = RankThreads(monkeypatch, folder, 1, attention_backend="triton")
    used = []
    monkeypatch.setattr(expanded_chunks, "MIN_TOKENS", 5)
    monkeypatch.setattr(expanded_chunks, "EXPANDED_NBYTES", 2048)  # of some heads alone
    modules = activation, fused_experts, grouped_linear, layernorm, moe, radix_attention, latent_attention, sparse_index
    for module in modules:
        monkeypatch.setattr(module, "use_kernels", lambda x: used.append(x) is None)
    for got, wanted in zip(ranks.logprobs(SEQUENCES, 64), expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-5)
    assert used
