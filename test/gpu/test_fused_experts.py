"""Owns the tests of stacked experts on a GPU: the numbers of the CPU, and in a CUDA graph."""

import pytest
import torch
from ramet.srt.layers import fused_experts as fe
from ramet.srt.layers.activation import get_activation

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
HIDDEN, SIZE, NUM_EXPERTS, TOP_K = 256, 128, 16, 4


def make_inputs(num_tokens: int, dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    """x, w13, w2, weights, ids on the CPU; a part of the ids belongs to other ranks."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, HIDDEN, generator=generator).to(dtype)
    w13 = (torch.randn(NUM_EXPERTS, 2 * SIZE, HIDDEN, generator=generator) / HIDDEN**0.5).to(dtype)
    w2 = (torch.randn(NUM_EXPERTS, HIDDEN, SIZE, generator=generator) / SIZE**0.5).to(dtype)
    weights = torch.rand(num_tokens, TOP_K, generator=generator)
    ids = torch.randint(-4, NUM_EXPERTS + 4, (num_tokens, TOP_K), generator=generator)
    return [x, w13, w2, weights, ids]


def run(inputs: list[torch.Tensor]) -> torch.Tensor:
    return fe.fused_experts(*inputs, get_activation("silu"))


@pytest.mark.parametrize("num_tokens", [0, 1, 3, 64, 1000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_equals_the_cpu(num_tokens, dtype):
    inputs = make_inputs(num_tokens, dtype)
    expected = run([tensor.float() if tensor.is_floating_point() else tensor for tensor in inputs])
    y = run([tensor.cuda() for tensor in inputs])
    assert y.dtype == dtype
    torch.testing.assert_close(y.cpu().float(), expected, atol=0.03, rtol=0.03)


def test_no_token_for_any_expert():
    inputs = [tensor.cuda() for tensor in make_inputs(8, torch.bfloat16)]
    inputs[4].fill_(-1)
    assert not run(inputs).any()


def test_a_cuda_graph_follows_the_routing():
    static = [tensor.cuda() for tensor in make_inputs(16, torch.bfloat16)]
    run(static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(static)
    for seed in (1, 2):
        new = make_inputs(16, torch.bfloat16, seed)
        for place in (0, 3, 4):
            static[place].copy_(new[place])
        graph.replay()
        torch.testing.assert_close(y, run(static), atol=1e-2, rtol=1e-2)
