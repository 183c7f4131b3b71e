"""How the sampler draws tokens, and finds the largest probabilities without the kernel for it."""

import pytest
import torch
from fake_gpu import RecordOutputs, fake_gpu
from ramet.srt.layers.sampler import INVALID_TOKEN, SamplingInfo, _largest, sample
from ramet.srt.sampling.sampling_params import SamplingParams

VOCAB_SIZE = 97


@pytest.mark.parametrize("num", [1, 50, VOCAB_SIZE])
def test_largest_on_a_cpu(num):
    probs = torch.rand(3, VOCAB_SIZE)
    assert torch.equal(_largest(probs, num), probs.topk(num).values)


@pytest.mark.parametrize(("num", "taken"), [(50, "topk"), (VOCAB_SIZE, "sort")])
def test_a_gpu_sorts_the_vocabulary_only_where_it_must(monkeypatch, num, taken):
    with fake_gpu(monkeypatch, (9, 0), has_triton=False):
        probs = torch.empty(2, VOCAB_SIZE, device="cuda")
        with RecordOutputs() as record:
            assert _largest(probs, num).shape == (2, num)
    assert {"topk", "sort"}.intersection(record.names) == {taken}


def test_a_rounding_of_the_sum_draws_no_banned_token(monkeypatch):
    """A GPU's sum of one row may grow by a rounding where it should stay as it is."""
    logits = torch.tensor([[0.0, float("-inf"), 0.0]])
    info = SamplingInfo.from_params([SamplingParams(temperature=1.0)], [0], 3, torch.device("cpu"))
    summed = torch.tensor([[0.5, 0.5 + 2**-24, 1.0]])
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda self, dim: summed)
    assert sample(logits, info, torch.tensor([0.5])).item() in (0, 2)


def test_a_row_without_numbers_draws_nothing():
    info = SamplingInfo.from_params(2 * [SamplingParams(temperature=1.0)], [0, 0], 3, torch.device("cpu"))
    logits = torch.tensor([3 * [float("nan")], [float("-inf"), 0.0, float("-inf")]])
    assert sample(logits, info, torch.tensor([0.5, 0.5])).tolist() == [INVALID_TOKEN, 1]
