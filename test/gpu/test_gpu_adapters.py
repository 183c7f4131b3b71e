"""Adapters on a GPU: from CUDA graphs and without, several in a pass, against models that they are merged into."""

import pytest
import random_models as rm
from engine_harness import EngineHarness
from lora_adapters import make_adapter, merge_adapter

PROMPTS = rm.random_prompts([1, 5, 33, 60])
NUM_TOKENS = 10
VARIANTS = {"graphs and overlap": {"overlap": True}, "without graphs": {"disable_cuda_graph": True}}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", ["llama3", "qwen2"])
def test_several_adapters_in_one_pass(tmp_path, family, variant):
    model = rm.make_model(tmp_path / "model", family)
    adapters = {
        1: make_adapter(tmp_path / "1", model, rank=6),
        2: make_adapter(tmp_path / "2", model, rank=24, targets=("v_proj", "down_proj"), seed=2),
        3: make_adapter(tmp_path / "3", model, rank=1, targets=("gate_proj", "o_proj"), seed=3),
    }
    models = {0: model} | {
        number: merge_adapter(model, folder, tmp_path / f"merged{number}") for number, folder in adapters.items()
    }
    expected = {number: rm.hf_greedy(folder, PROMPTS, NUM_TOKENS) for number, folder in models.items()}
    # Two slots for three adapters: what is in a slot changes between replays.
    engine = EngineHarness(
        model, device="cuda", enable_lora=True, max_loras_per_batch=2, max_lora_rank=24, **VARIANTS[variant]
    )
    for number, folder in adapters.items():
        assert engine.load_adapter(number, folder) == ""
    for _ in range(2):
        engine.channel.outputs.clear()
        for number in expected:
            for place, prompt in enumerate(PROMPTS):
                engine.submit(f"{number} {place}", prompt, lora_id=number, max_new_tokens=NUM_TOKENS)
        results = engine.run()
        for number, tokens in expected.items():
            assert [results[f"{number} {place}"].token_ids for place in range(len(PROMPTS))] == tokens
