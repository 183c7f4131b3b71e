"""Kernels of libraries for prompt chunks, those that are installed, against torch_native on the same GPU."""

import pytest
import torch
from attention_case import Case
from ramet.srt.layers.attention.base_attn_backend import PassLimits
from ramet.srt.layers.attention.prompts.choice import CANDIDATES, PromptChoice
from ramet.srt.layers.attention.triton_backend import TritonAttnBackend

DEVICE = torch.device("cuda", 0)
SHAPES = {  # (heads, kv heads, head_dim), type
    "a model's shape": ((32, 8, 128), torch.bfloat16),
    "group of 7": ((14, 2, 64), torch.float16),
}
PASSES = {
    "one prompt": [(0, 700)],
    "long ones by themselves": [(0, 1500), (3000, 1024)],
    "short ones together": [(0, 300), (40, 17), (1000, 256), (0, 5)],
    "beside decoding requests": [(700, 1), (20, 1), (0, 1300), (500, 400), (0, 30)],
    "more than a graph holds": [(index, 20) for index in range(70)],
}


class Chosen:
    """A choice that is made."""

    def __init__(self, prompts):
        self.chosen = prompts


@pytest.fixture(params=CANDIDATES, ids=lambda candidate: candidate.name)
def candidate(request):
    return request.param


@pytest.mark.parametrize("window", [None, 200])
@pytest.mark.parametrize(("shape", "dtype"), SHAPES.values(), ids=SHAPES)
def test_passes_with_chunks(candidate, shape, dtype, window):
    prompts = None
    for sequences in PASSES.values():
        case = Case(DEVICE, sequences, shape, page_size=16, window=window, dtype=dtype)
        if (obstacle := candidate.obstacle(case.spec)) is not None:
            pytest.skip(f"{candidate.name} needs {obstacle}")
        if prompts is None:
            prompts = candidate(case.spec, PassLimits(max_tokens=2048, max_keys=8192, num_pages=2000))
        backend = TritonAttnBackend(case.spec, case.pool)
        backend._choice = Chosen(prompts)
        case.check_made(backend)


def test_a_choice_is_made_and_its_results_were_compared(candidate, caplog):
    case = Case(DEVICE, [(0, 100)], (32, 8, 128), page_size=16, dtype=torch.bfloat16)
    if (obstacle := candidate.obstacle(case.spec)) is not None:
        pytest.skip(f"{candidate.name} needs {obstacle}")
    own = TritonAttnBackend(case.spec, case.pool).plan_prompts
    with caplog.at_level("INFO"):
        choice = PromptChoice(case.spec, PassLimits(max_tokens=4096, max_keys=8192, num_pages=2000), own)
        choice.wait(120)
    assert f"{candidate.name} takes" in caplog.text and "is not used" not in caplog.text
