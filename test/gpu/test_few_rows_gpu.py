"""The kernel for products of a few rows on a GPU: alone, in a graph, and the same numbers each time."""

import pytest
import torch
from ramet.srt.layers.kernels.few_rows import few_rows_linear, takes
from ramet.srt.layers.matmul import project

SHAPES = [(6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288), (1024, 2048), (128, 2048)]


@pytest.mark.parametrize("num_rows", [2, 7, 16, 24, 32])
@pytest.mark.parametrize(("num_outputs", "num_columns"), SHAPES)
def test_product(num_outputs, num_columns, num_rows):
    torch.manual_seed(num_rows)
    weight = (torch.randn(num_outputs, num_columns, device="cuda") / num_columns**0.5).bfloat16()
    x = torch.randn(num_rows, num_columns, device="cuda").bfloat16()
    if not takes(x, weight):
        pytest.skip("not on this GPU")
    expected = x.double() @ weight.double().T
    first = few_rows_linear(x, weight)
    assert float((first.double() - expected).norm() / expected.norm()) < 5e-3
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        few_rows_linear(x, weight)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            outs = [project(x, weight) for _ in range(50)]
    for _ in range(20):
        for out in outs:
            out.fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(out, first) for out in outs), "the order of the sums is always the same"
