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
