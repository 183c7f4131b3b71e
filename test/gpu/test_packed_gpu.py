"""Few rows times weights of four bits on a GPU: in a graph, and the same numbers each time."""

import statistics

import packed_models as pm
import pytest
import random_models as rm
import torch
from engine_harness import EngineHarness
from ramet.srt.configs.quantization_readers import read_quantization
from ramet.srt.layers.activation import get_activation
from ramet.srt.layers.matmul import multiply_row, project, takes_gemv
from ramet.srt.layers.parameter import declare_weight
from ramet.srt.layers.quantization.declare import declare_format
from ramet.srt.layers.quantization.dequantize import dequantize
from ramet.srt.layers.quantization.packed import leaves_row_sums, packed_row_sums
from ramet.srt.layers.quantization.weight import QuantizedWeight, weight_of
from ramet.srt.layers.row_sums import GatedSums, RowSums, UnscaledRow
from ramet.srt.weights.manifest import WeightBox

KINDS = {"awq": pm.awq(128), "awq by row": pm.awq(None), "gptq": pm.gptq(group=128), "gptq of 8 bits": pm.gptq(8)}


def random_weight(kind, num_rows, num_columns) -> QuantizedWeight:
    """Random bits: nothing is packed."""
    config = read_quantization({"quantization_config": kind.section}, None, "/models/m", None)
    layer = torch.nn.Module()
    box = WeightBox("0.weight", ((0, num_rows), (0, num_columns)), ((0, num_rows), (0, num_columns)))
    layer.weight = declare_weight((num_rows, num_columns), torch.float32, [box], all_columns=num_columns)
    declare_format(layer, "weight", config.format, "cuda")
    for name, parameter in list(layer.named_parameters()):
        if parameter.dtype == torch.int32:
            filled = torch.randint(-(1 << 31), 1 << 31, parameter.shape, device="cuda").int()
        else:
            filled = torch.rand(parameter.shape, device="cuda") * 0.01
        setattr(layer, name, torch.nn.Parameter(filled, requires_grad=False))
    return weight_of(layer, "weight")


# Each compiles the kernel once more, for a second or two: whole splits and ones that are not full, gated or not.
CASES = [
    ("awq", 6144, 4096, torch.bfloat16, ""),
    ("awq", 24576, 4096, torch.bfloat16, "silu"),
    ("awq", 4096, 12288, torch.float16, ""),
    ("awq", 1040, 1824, torch.float16, "silu"),
    ("awq by row", 1040, 1824, torch.bfloat16, ""),
    ("gptq", 4096, 12288, torch.bfloat16, ""),
    ("gptq", 24576, 4096, torch.float16, "silu"),
    ("gptq", 1040, 1824, torch.bfloat16, ""),
    ("gptq of 8 bits", 1040, 1824, torch.bfloat16, ""),
]


@pytest.mark.parametrize(("kind", "num_outputs", "num_columns", "dtype", "activation"), CASES, ids=str)
def test_product(kind, num_outputs, num_columns, dtype, activation):
    torch.manual_seed(0)
    weight = random_weight(KINDS[kind], num_outputs, num_columns)
    x = torch.randn(1, num_columns, device="cuda").to(dtype) / num_columns**0.5
    bias = torch.randn(num_outputs, device="cuda").to(dtype)
    expected = x.double() @ dequantize(weight, torch.float32).double().T + bias
    if activation:
        gate, up = expected.chunk(2, dim=1)
        expected = get_activation(activation)(gate) * up

    def multiply():
        return multiply_row(x, weight, bias, activation) if activation else project(x, weight, bias)

    assert takes_gemv(x, weight)
    first = multiply()
    assert float((first.double() - expected).norm() / expected.norm()) < 5e-3
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        multiply()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            outs = [multiply() for _ in range(20)]
    for _ in range(3):
        for out in outs:
            out.fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(out, first) for out in outs), "the order of the sums is always the same"


@pytest.mark.parametrize("num_outputs, num_columns", [(6144, 4096), (4096, 12288), (1040, 1792)], ids=str)
@pytest.mark.parametrize("kind", ["row", "unscaled", "gated"])
def test_sums_of_a_row_of_awq(kind, num_outputs, num_columns):
    """Left to who reads them, of each form in which a row comes."""
    torch.manual_seed(0)
    weight = random_weight(KINDS["awq"], num_outputs, num_columns)
    bias = torch.randn(num_outputs, device="cuda").bfloat16()
    row = torch.randn(1, num_columns, device="cuda").bfloat16()
    x = row
    expected_x = row.double()
    if kind == "unscaled":
        squares = torch.rand(33, device="cuda")
        x = UnscaledRow(row, squares, 1e-6)
        expected_x = expected_x * torch.rsqrt(squares.double().sum() / num_columns + 1e-6)
    if kind == "gated":
        parts = torch.randn(6, 2 * num_columns, device="cuda")
        x = GatedSums(RowSums(parts, torch.bfloat16), get_activation("silu"))
        gate, up = parts.double().sum(0, keepdim=True).chunk(2, dim=1)
        expected_x = torch.nn.functional.silu(gate) * up
    assert leaves_row_sums(weight, torch.bfloat16)
    y = RowSums(packed_row_sums(x, weight, bias), torch.float32).whole()
    expected = expected_x @ dequantize(weight, torch.float32).double().T + bias
    assert float((y.double() - expected).norm() / expected.norm()) < 5e-3


def test_one_request_of_an_awq_model_takes_that_way(tmp_path):
    """Token by token, alone and in a graph, as several at once are computed another way: the same log-probabilities."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    source = rm.make_model(tmp_path / "source", "qwen3", dtype="bfloat16", head_dim=64, num_hidden_layers=3, **sizes)
    folder, _ = pm.write(source, tmp_path / "model", pm.awq(128))
    prompts = rm.random_prompts([5, 40, 90])
    options = {"device": "cuda", "max_total_tokens": 4096, "page_size": 16, "overlap": True}
    request = {"max_new_tokens": 24, "return_logprob": True}
    engine = EngineHarness(folder, **options)
    together = engine.generate(prompts, **request)
    for graphs in (True, False):
        errors: list[float] = []
        engine = EngineHarness(folder, disable_cuda_graph=not graphs, **options)
        for prompt, expected in zip(prompts, together, strict=True):
            (alone,) = engine.generate([prompt], **request)
            pairs = enumerate(zip(alone.token_ids, expected.token_ids, strict=True))
            same = next((place for place, (one, other) in pairs if one != other), len(alone.token_ids))
            assert same > 4, "near equal tokens may be chosen otherwise, but not so soon"
            errors += [
                abs(one - other)
                for one, other in zip(alone.output_logprobs[:same], expected.output_logprobs[:same], strict=True)
            ]
        # Each way rounds to bfloat16 in other places, which moves some tokens by 0.06.
        assert max(errors) < 0.12 and statistics.mean(errors) < 0.03
        assert all(layer._row_path is not None for layer in engine.runner.model.model.layers.values())


@pytest.mark.parametrize("num_rows", [3, 16, 50])
@pytest.mark.parametrize(("num_outputs", "num_columns"), [(6144, 4096), (1040, 1824)], ids=str)
def test_few_rows_of_awq(num_rows, num_outputs, num_columns):
    torch.manual_seed(0)
    weight = random_weight(KINDS["awq"], num_outputs, num_columns)
    x = torch.randn(num_rows, num_columns, device="cuda").bfloat16() / num_columns**0.5
    bias = torch.randn(num_outputs, device="cuda").bfloat16()
    expected = x.double() @ dequantize(weight, torch.float32).double().T + bias
    y = project(x, weight, bias)
    assert float((y.double() - expected).norm() / expected.norm()) < 5e-3
    assert torch.equal(project(x, weight, bias), y)
