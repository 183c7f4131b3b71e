"""Every attention backend that is installed against torch_native on the same GPU."""

import pytest
import random_models as rm
import torch
from attention_case import Case
from engine_harness import EngineHarness
from ramet.srt.layers.attention.registry import PREFERENCE, choose_attn_backend
from ramet.srt.layers.attention.requirements import missing_package

PAGE_SIZES = {"torch_varlen": 256}  # of others 16
# Few types and head sizes: FlashInfer compiles kernels for each when it first meets it.
SHAPES = {  # (heads, kv heads, head_dim), type
    "no group": ((4, 4, 64), torch.float16),
    "group of 2": ((8, 4, 64), torch.float16),
    "group of 7": ((14, 2, 64), torch.float16),
    "a model's shape": ((32, 8, 128), torch.bfloat16),
}
PREFILL = [(0, 5), (300, 1), (17, 130), (256, 256), (0, 700)]
DECODE = [(0, 1), (15, 1), (16, 1), (255, 1), (999, 1)]
PROMPTS = rm.random_prompts([1, 5, 17, 33, 130])
NUM_TOKENS = 24


@pytest.fixture(params=[name for name in PREFERENCE if name != "torch_native"])
def name(request):
    missing = missing_package(request.param)
    if missing is not None:
        pytest.skip(f"{request.param} needs {missing}")
    return request.param


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize(("shape", "dtype"), SHAPES.values(), ids=SHAPES)
def test_one_layer(name, shape, dtype, window):
    for sequences, decode in ((PREFILL, False), (DECODE, True)):
        options = {"page_size": PAGE_SIZES.get(name, 16), "window": window, "dtype": dtype, "decode": decode}
        case = Case(torch.device("cuda", 0), sequences, shape, **options)
        case.check(choose_attn_backend(name, case.spec))


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "no graphs"])
@pytest.mark.parametrize("family", ["llama3", "mistral"])  # mistral has a sliding window
def test_greedy_tokens_of_an_engine(tmp_path, name, family, graphs):
    """Chunked prompts, then many decode passes of a shrinking batch, planned while the one before still runs.

    Half precision may choose another token between two that are as likely, so torch_native says how likely it finds
    each one that was chosen.
    """
    folder = rm.make_model(tmp_path, family, dtype="float16", head_dim=64)
    sizes = {"page_size": PAGE_SIZES.get(name, 16), "max_total_tokens": 8192, "chunked_prefill_size": 50}
    engine = EngineHarness(
        folder, device="cuda", attention_backend=name, overlap=True, disable_cuda_graph=not graphs, **sizes
    )
    assert (engine.runner.graph_runner is not None) == graphs
    native = EngineHarness(folder, device="cuda", attention_backend="torch_native", disable_cuda_graph=True, **sizes)
    for _ in range(2):  # the second time behind cached prefixes
        for index, prompt in enumerate(PROMPTS):
            engine.submit(str(index), prompt, max_new_tokens=NUM_TOKENS - 4 * index, return_logprob=True)
        results = engine.run()
        results = [results[str(index)] for index in range(len(PROMPTS))]
        engine.channel.outputs.clear()
        whole = [prompt + result.token_ids for prompt, result in zip(PROMPTS, results, strict=True)]
        scores = native.generate(whole, max_new_tokens=1, logprob_start_len=0, top=1)
        for prompt, result, score in zip(PROMPTS, results, scores, strict=True):
            theirs = score.input_logprobs.logprobs[len(prompt) :]
            best = [top[0] for top in score.input_logprobs.top_logprobs[len(prompt) :]]
            assert len(theirs) == len(result.token_ids) > 0
            assert result.output_logprobs == pytest.approx(theirs, abs=0.1)
            assert theirs == pytest.approx(best, abs=0.1)
