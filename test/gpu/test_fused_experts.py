"""Owns the tests of stacked experts on a GPU: the numbers of the CPU, in every type, and in a CUDA graph."""

import pytest
import torch
from fp8_models import fp8_weight, on_device
from ramet.srt.layers import grouped_linear as gl
from ramet.srt.layers.activation import get_activation
from ramet.srt.layers.fused_experts import fused_experts
from ramet.srt.layers.quantization.dequantize import dequantize
from ramet.srt.layers.quantization.weight import QuantizedWeight, Weight

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
NUM_EXPERTS, TOP_K = 16, 4
KINDS = ["bfloat16", "float16", "float32", "fp8 bfloat16", "fp8 float16", "fp8 float32"]
SHAPES = {"aligned": (256, 128), "not aligned": (248, 44)}  # to what torch's product takes: (hidden size, size)


def make_inputs(num_tokens: int, kind: str, shape=SHAPES["aligned"], seed: int = 0) -> list[Weight]:
    """x, w13, w2, weights and ids on the CPU; a part of the ids belongs to other ranks."""
    hidden_size, size = shape
    dtype = getattr(torch, kind.split()[-1])
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, hidden_size, generator=generator).to(dtype)
    w13 = (torch.randn(NUM_EXPERTS, 2 * size, hidden_size, generator=generator) / hidden_size**0.5).to(dtype)
    w2 = (torch.randn(NUM_EXPERTS, hidden_size, size, generator=generator) / size**0.5).to(dtype)
    weights = torch.rand(num_tokens, TOP_K, generator=generator)
    ids = torch.randint(-4, NUM_EXPERTS + 4, (num_tokens, TOP_K), generator=generator)
    if kind.startswith("fp8"):
        w13, w2 = fp8_weight(w13), fp8_weight(w2)
    return [x, w13, w2, weights, ids]


def on_gpu(inputs: list[Weight]) -> list[Weight]:
    return [on_device(one, "cuda") for one in inputs]


def run(inputs: list[Weight]) -> torch.Tensor:
    return fused_experts(*inputs, get_activation("silu"))


def exact(inputs: list[Weight]) -> torch.Tensor:
    """On the CPU, in float32, with the values that the weights have."""
    x, w13, w2, weights, ids = inputs
    if isinstance(w13, QuantizedWeight):
        w13, w2 = (torch.stack([dequantize(w[e], torch.float32) for e in range(NUM_EXPERTS)]) for w in (w13, w2))
    return run([x.float(), w13.float(), w2.float(), weights, ids])


@pytest.mark.parametrize("num_tokens", [0, 1, 3, 64, 1000])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_the_cpu(num_tokens, kind, shape):
    inputs = make_inputs(num_tokens, kind, shape)
    y, expected = run(on_gpu(inputs)), exact(inputs)
    assert y.dtype == inputs[0].dtype
    # Where the GPU multiplies fp8, the rows of x and of the hidden values are rounded too.
    bound = 0.08 if kind.startswith("fp8") else {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}[kind]
    assert (y.cpu().float() - expected).norm() <= bound * expected.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_no_token_for_any_expert(kind):
    inputs = on_gpu(make_inputs(8, kind))
    inputs[4].fill_(-1)
    assert not run(inputs).any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_cuda_graph_follows_the_routing(kind, shape):
    static = on_gpu(make_inputs(16, kind, shape))
    run(static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(static)
    for seed in (1, 2):
        new = make_inputs(16, kind, shape, seed)
        for place in (0, 3, 4):
            static[place].copy_(new[place])
        graph.replay()
        torch.testing.assert_close(y, run(static), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("kind", ["bfloat16", "fp8 bfloat16"])
def test_torchs_product_is_taken_and_equals_the_kernel(kind, monkeypatch):
    """Groups start at any row, and some are empty."""
    from ramet.srt.layers.kernels.grouped_linear import grouped_linear as by_kernel

    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("torch's grouped product of both types needs a Hopper GPU")
    x, w13, *_ = on_gpu(make_inputs(75, kind))
    sizes = torch.tensor([1, 0, 3, 17, 0, 0, 5, 1, 1, 2, 0, 9, 30, 0, 2, 1])
    ends = sizes.cumsum(0).int().cuda()
    taken = []
    by_torch = gl.multiply_by_torch
    monkeypatch.setattr(gl, "multiply_by_torch", lambda *args: taken.append(1) or by_torch(*args))
    parts = (w13.values, ends, w13.scales) if isinstance(w13, QuantizedWeight) else (w13, ends)
    y, expected = gl.grouped_linear(x, w13, ends), by_kernel(x, *parts)
    assert taken
    stop = int(ends[-1])
    assert stop < len(x)
    difference = (y[:stop].float() - expected[:stop].float()).norm() / expected[:stop].float().norm()
    assert difference < (0.04 if kind.startswith("fp8") else 0.01)
