"""The kernels of gated delta nets at the sizes of published models, on a GPU, against plain torch there."""

import dataclasses

import pytest
import random_models as rm
import torch
from delta_case import DeltaCase, Part
from engine_harness import EngineHarness
from ramet.srt.configs.delta_config import DeltaTraits
from ramet.srt.layers.attention.base_attn_backend import CapturedShape

DEVICE = torch.device("cuda", 0)
SIZES = {"num_key_heads": 16, "num_value_heads": 32, "key_dim": 128, "value_dim": 128, "kernel_size": 4}
SHAPES = {
    "Qwen3-Next": DeltaTraits(**SIZES, is_by_key_head=True),
    "Qwen3.5 9B": DeltaTraits(**SIZES, is_by_key_head=False),
    "a rank of eight": DeltaTraits(**SIZES | {"num_key_heads": 2, "num_value_heads": 4}, is_by_key_head=True),
}
MIXED = [
    Part(0, 0, 700, ((64, 9), (656, 10))),
    Part(1, 4096, 513, ((1, 11),)),
    Part(2, 17, 1),
    Part(3, 0, 2),
    Part(4, 0, 1),
    Part(5, 8191, 1),
    Part(8, 0, 1),
]
DECODING = [Part(row, 100 + row, 1) for row in range(7)]


def error(got, wanted):
    return ((got.float() - wanted.float()).norm() / wanted.float().norm()).item()


def compare(case, parts, limit, *, is_captured=False):
    batch = case.batch(parts)
    inputs = case.inputs(sum(part.length for part in parts))
    before = case.pool.buffer.clone()
    wanted = case.run(batch, inputs, kernels=False)
    conv, matrices = case.pool.conv(0)[1:].clone(), case.pool.matrices(0)[1:].clone()
    case.pool.buffer.copy_(before)
    if is_captured:
        shape = CapturedShape(batch.tokens.num_tokens, True)
        case.passes.init_captured([shape], DEVICE)
        assert case.passes.prepare(shape, batch.tokens)
        batch = dataclasses.replace(batch, is_captured=True)
    case.passes.begin(batch)
    got = case.run(batch, inputs, kernels=True)
    assert torch.isfinite(got).all()
    assert error(got, wanted) < limit
    assert torch.equal(case.pool.conv(0)[1:], conv)
    assert error(case.pool.matrices(0)[1:], matrices) < limit


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("is_captured", [False, True])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2), (torch.float16, 5e-3)])
def test_mixed_passes_and_decoding(shape, dtype, limit, is_captured):
    case = DeltaCase(DEVICE, SHAPES[shape], dtype, num_rows=8)
    case.fill_states()
    compare(case, MIXED, limit, is_captured=is_captured)
    compare(case, DECODING, limit)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_long_prompt_in_chunks_of_passes(shape):
    """The state goes through 8192 tokens in bfloat16, and stays near what float32 makes of the same numbers."""
    case = DeltaCase(DEVICE, SHAPES[shape], torch.bfloat16, num_rows=2)
    exact = DeltaCase(DEVICE, SHAPES[shape], torch.float32, num_rows=2)
    for name in ("conv", "a_log", "dt_bias", "norm"):
        getattr(exact.layer, name).copy_(getattr(case.layer, name))
    inputs = case.inputs(8192)
    for start, stop in ((0, 3000), (3000, 3001), (3001, 8192)):
        part = tuple(one[start:stop] for one in inputs)
        batch = case.batch([Part(0, start, stop - start)])
        case.passes.begin(batch)
        got = case.run(batch, part, kernels=True)
        wanted = exact.run(
            exact.batch([Part(0, start, stop - start)]), tuple(one.float() for one in part), kernels=False
        )
        assert error(got, wanted) < 3e-2
    assert error(case.pool.matrices(0)[1], exact.pool.matrices(0)[1]) < 3e-2


@pytest.mark.parametrize("num_rows", [1, 64])
def test_many_rows_decode(num_rows):
    case = DeltaCase(DEVICE, SHAPES["Qwen3.5 9B"], torch.bfloat16, num_rows=num_rows)
    case.fill_states()
    compare(case, [Part(row, 5, 1) for row in range(num_rows)], 2e-2)


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5"])
@pytest.mark.parametrize("options", [{}, {"overlap": True}, {"disable_cuda_graph": True}, {"chunked_prefill_size": 24}])
def test_tokens_of_whole_models(tmp_path, family, options):
    """By graphs and launches; a repeated prompt, one that goes on, and a long one among short ones."""
    folder = rm.make_model(tmp_path, family)
    prompts = rm.random_prompts([150, 5, 33, 64, 2, 1])
    expected = rm.hf_greedy(folder, prompts, 12)
    engine = EngineHarness(folder, dtype="float32", **options)
    for _ in range(2):
        results = engine.generate(prompts, max_new_tokens=12)
        assert [result.token_ids for result in results] == expected
    assert results[0].cached_tokens == 148
    longer = [prompt + tokens for prompt, tokens in zip(prompts, expected, strict=True)]
    results = engine.generate(longer, max_new_tokens=5)
    assert [result.token_ids for result in results] == rm.hf_greedy(folder, longer, 5)
