"""The kernels of a gated delta net against plain torch: outputs, and the states behind a pass."""

import dataclasses

import pytest
import torch
from delta_case import DeltaCase, Part
from ramet.srt.configs.delta_config import DeltaTraits
from ramet.srt.layers.attention.base_attn_backend import CapturedShape

SHAPES = {
    "by key head": DeltaTraits(
        num_key_heads=2, num_value_heads=4, key_dim=20, value_dim=12, kernel_size=4, is_by_key_head=True
    ),
    "part by part": DeltaTraits(
        num_key_heads=2, num_value_heads=2, key_dim=16, value_dim=40, kernel_size=3, is_by_key_head=False
    ),
}
# A prompt that begins, one that goes on behind others, one that decodes, the shortest chunk, padding, and states that
# are kept on the way: a token behind the beginning, where the convolution's inputs are older, and within a chunk.
MIXED = [
    Part(0, 0, 66, ((64, 7),)),
    Part(1, 33, 40, ((1, 8), (20, 9))),
    Part(2, 17, 1),
    Part(3, 0, 2),
    Part(4, 0, 1),
    Part(6, 0, 1),
]
DECODING = [Part(0, 66, 1), Part(3, 2, 1), Part(5, 0, 1), Part(1, 73, 1), Part(6, 0, 1)]


@pytest.fixture(params=SHAPES)
def traits(request, device):
    return SHAPES[request.param]


def compare(case, parts, *, atol, is_captured=False):
    """By both ways from the same states on; those that the kernels leave stay."""
    batch = case.batch(parts)
    inputs = case.inputs(sum(part.length for part in parts))
    before = case.pool.buffer.clone()
    expected = case.run(batch, inputs, kernels=False)
    wanted = [case.pool.conv(0)[1:].clone(), case.pool.matrices(0)[1:].clone()]
    case.pool.buffer.copy_(before)
    if is_captured:  # what is at fixed addresses has more places than the pass fills
        shape = CapturedShape(batch.tokens.num_tokens, True)
        case.passes.init_captured([shape], case.device)
        assert case.passes.prepare(shape, batch.tokens)
        batch = dataclasses.replace(batch, is_captured=True)
    case.passes.begin(batch)
    got = case.run(batch, inputs, kernels=True)
    torch.testing.assert_close(got, expected, atol=atol, rtol=atol)
    torch.testing.assert_close(case.pool.conv(0)[1:], wanted[0], atol=0, rtol=0)
    torch.testing.assert_close(case.pool.matrices(0)[1:], wanted[1], atol=atol, rtol=atol)


def test_prompts_and_single_tokens_in_one_pass(device, traits):
    case = DeltaCase(device, traits, torch.float32)
    case.fill_states()
    compare(case, MIXED, atol=2e-5)
    compare(case, DECODING, atol=2e-5)


def test_half_precision_in_a_captured_pass(device):
    case = DeltaCase(device, SHAPES["part by part"], torch.float16)
    case.fill_states()
    compare(case, MIXED, atol=1e-2, is_captured=True)
    compare(case, DECODING, atol=1e-2)


def test_a_captured_pass_has_places_for_so_many_sequences(device):
    case = DeltaCase(device, SHAPES["by key head"], torch.float32)
    shape = CapturedShape(512, True)
    case.passes.init_captured([shape], device)
    for num_sequences, fits in ((32, True), (33, False)):
        tokens = case.batch([Part(0, 0, 2)] * num_sequences).tokens.padded(512, 6)
        assert case.passes.prepare(shape, tokens) == fits


def test_many_passes_add_no_error(device):
    """A state goes through chunks and steps of all lengths, by kernels alone and by torch alone."""
    case = DeltaCase(device, SHAPES["part by part"], torch.float32)
    parts = [Part(0, 0, 3), Part(0, 3, 1), Part(0, 4, 21), Part(0, 25, 1)]
    inputs = [case.inputs(part.length) for part in parts]
    outputs = []
    for kernels in (False, True):
        results = []
        for part, one in zip(parts, inputs, strict=True):
            batch = case.batch([part])
            case.passes.begin(batch)
            results.append(case.run(batch, one, kernels=kernels))
        outputs.append(torch.cat(results))
    torch.testing.assert_close(outputs[1], outputs[0], atol=5e-5, rtol=5e-5)


def test_correlated_keys_stay_exact(device):
    """All keys of a chunk alike, nothing forgotten, everything written: the system that is solved is at its worst."""
    traits = SHAPES["part by part"]
    case = DeltaCase(device, traits, torch.float32)
    case.layer.a_log.fill_(-20.0)
    batch = case.batch([Part(0, 0, 64)])
    qkvz, ba = case.inputs(64)
    qkvz[:] = qkvz[:1]
    ba[:, : ba.shape[1] // 2] = 20.0
    case.passes.begin(batch)
    got = case.run(batch, (qkvz, ba), kernels=True)
    expected = case.run(batch, (qkvz.double(), ba.double()), kernels=False)
    torch.testing.assert_close(got, expected.float(), atol=1e-4, rtol=1e-4)
