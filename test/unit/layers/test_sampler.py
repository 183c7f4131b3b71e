"""How the sampler finds the largest probabilities without the kernel for it."""

import pytest
import torch
from fake_gpu import RecordOutputs, fake_gpu
from ramet.srt.layers.sampler import _largest

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
