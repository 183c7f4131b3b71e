"""A request alone in a model whose products leave their sums: what comes of it is what comes of whole rows."""

import statistics

import packed_models as pm
import pytest
import random_models as rm
import torch
from engine_harness import EngineHarness
from ramet.srt.layers.attention.radix_attention import RadixAttention
from ramet.srt.layers.quantization.dequantize import dequantize
from ramet.srt.layers.row_sums import GatedSums, UnscaledRow
from ramet.srt.models import row_path


def sums_in_torch(x, weight, bias):
    """Three parts, each of some columns, in place of the kernel, which needs a GPU."""
    if isinstance(x, GatedSums):
        gate, up = x.row.parts.sum(0, keepdim=True).chunk(2, dim=1)
        row = x.activation(gate) * up
    elif isinstance(x, UnscaledRow):
        row = x.values.float() * torch.rsqrt(x.squares.sum() / x.values.shape[1] + x.eps)
    else:
        row = x.float()
    matrix = dequantize(weight, torch.float32)
    columns = torch.arange(row.shape[1]).tensor_split(3)
    parts = torch.cat([row[:, some] @ matrix[:, some].T for some in columns])
    if bias is not None:
        parts[0] += bias
    return parts


@pytest.mark.parametrize("family", ["qwen3", "qwen2"])
def test_sums_are_read_where_they_are_left(tmp_path, monkeypatch, family):
    """Norms of heads and none, no biases and some; the last layer's sums end in a whole row, too."""
    source = rm.make_model(tmp_path / "source", family, dtype="bfloat16", num_hidden_layers=2)
    folder, _ = pm.write(source, tmp_path / "model", pm.awq())
    prompts, request = rm.random_prompts([1, 9]), {"max_new_tokens": 4, "return_logprob": True}
    monkeypatch.setenv("RAMET_CPU_KERNELS", "0")  # which round less often than a GPU's layers
    expected = EngineHarness(folder, device="cpu").generate(prompts, **request)
    calls = []

    def packed_row_sums(x, weight, bias):
        calls.append(type(x))
        return sums_in_torch(x, weight, bias)

    monkeypatch.setattr(row_path, "packed_row_sums", packed_row_sums)
    monkeypatch.setattr(row_path, "leaves_row_sums", lambda weight, _dtype: weight.format.has_awq_order)
    monkeypatch.setattr(row_path, "use_kernels", lambda _x: True)
    monkeypatch.setattr(RadixAttention, "has_kernels", lambda _self, _x: True)
    engine = EngineHarness(folder, device="cpu")
    for prompt, wanted in zip(prompts, expected, strict=True):
        (alone,) = engine.generate([prompt], **request)
        pairs = list(zip(alone.token_ids, wanted.token_ids, strict=True))
        same = next((place for place, (one, other) in enumerate(pairs) if one != other), len(pairs))
        assert same > 2, "near equal tokens may be chosen otherwise, but not so soon"
        both = zip(alone.output_logprobs[:same], wanted.output_logprobs[:same], strict=True)
        assert statistics.mean(abs(one - other) for one, other in both) < 0.03  # of bfloat16's rounding
    passes = 1 + 2 * 3  # that have one token: the short prompt, and those that decode
    assert calls[:8] == [
        torch.Tensor,
        torch.Tensor,
        UnscaledRow,
        GatedSums,
        UnscaledRow,
        torch.Tensor,
        UnscaledRow,
        GatedSums,
    ]
    assert len(calls) >= 8 * passes
