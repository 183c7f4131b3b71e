"""The search for the least probability that sampling keeps against the sorting one."""

import pytest
import torch
from ramet.srt.layers.sampler import SamplingInfo, sort_least_kept
from ramet.srt.sampling.sampling_params import SamplingParams

PARAMS = [
    SamplingParams(top_k=1, temperature=1.0),
    SamplingParams(top_k=7),
    SamplingParams(top_p=0.8),
    SamplingParams(top_p=0.01),
    SamplingParams(min_p=0.2),
    SamplingParams(top_k=50, top_p=0.9, min_p=0.01),
    SamplingParams(),
]


@pytest.mark.parametrize("sharpness", [0.5, 5.0])
def test_least_kept(device, sharpness):
    from ramet.srt.layers.kernels.sampling import least_kept

    vocab_size = 331
    probs = torch.softmax(sharpness * torch.randn(len(PARAMS), vocab_size, device=device), dim=-1)
    info = SamplingInfo.from_params(PARAMS, [0] * len(PARAMS), vocab_size, device)
    expected = sort_least_kept(probs, info)
    found = least_kept(probs, info.top_ks, info.top_ps, info.min_ps)
    # The two sum in another order and may part at a limit, but keep all the same tokens here.
    assert torch.equal(probs >= found, probs >= expected)


@pytest.mark.parametrize("num_columns", [1, 1000, 5003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_best_tokens(device, num_columns, dtype):
    """The first of equals wins; a row whose best is NaN or infinite has none, as in sample()."""
    from ramet.srt.layers.kernels.best_token import best_tokens

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, num_columns, generator=generator).to(dtype)
    expected = logits.argmax(dim=-1)
    last = num_columns - 1
    logits[1, [last, last // 2]] = 100.0
    expected[1] = last // 2
    logits[3, last // 3] = float("nan")
    logits[4] = float("-inf")
    logits[5, last] = float("inf")
    logits[6, : num_columns // 2] = float("-inf")
    expected[6] = num_columns // 2 + int(logits[6, num_columns // 2 :].argmax())
    expected[3:6] = -1
    padded = torch.full((9, num_columns + 8), 1000.0, dtype=dtype)
    padded[:, :num_columns] = logits
    for _ in range(2):  # the counters are as they were
        assert best_tokens(padded.to(device)[:, :num_columns], -1).tolist() == expected.tolist()
