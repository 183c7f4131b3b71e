"""The cpu attention backend against torch_native, and what it does until its kernels are there."""

import dataclasses

import pytest
import torch
from attention_case import Case
from cpu_kernels import cpu_kernels  # noqa: F401
from ramet.srt.layers.attention.cpu_backend import CpuAttnBackend
from ramet.srt.layers.attention.registry import choose_attn_backend
from ramet.srt.layers.cpu_kernels import library

CPU = torch.device("cpu")
GROUPED, ALONE, WIDE = (4, 2, 16), (2, 2, 24), (14, 2, 64)  # heads, kv heads, head_dim
MIXES = {
    "whole prompts": [(0, 5), (0, 16), (0, 1)],
    "behind prefixes": [(16, 7), (3, 12), (130, 40)],
    "one token": [(6, 1)],
    "single tokens": [(60, 1), (2, 1), (0, 1), (63, 1), (3, 1), (200, 1)],
    "mixed": [(40, 1), (0, 9), (15, 1), (8, 33), (39, 1), (0, 1)],
    "one long sequence, in ranges of keys": [(1500, 1)],
    "long ones": [(1100, 3), (700, 1)],
}

pytestmark = pytest.mark.usefixtures("cpu_kernels")


@pytest.mark.parametrize("window", [None, 1, 9, 300])
@pytest.mark.parametrize("sequences", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize("shape", [GROUPED, ALONE, WIDE])
def test_it_gives_what_pytorch_gives(sequences, window, shape):
    Case(CPU, sequences, shape, window=window).check(CpuAttnBackend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sequences", MIXES.values(), ids=MIXES)
def test_half_precision(sequences, dtype):
    for sinks in (False, True):
        Case(CPU, sequences, WIDE, dtype=dtype, page_size=16, sinks=sinks).check(CpuAttnBackend)


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("sequences", MIXES.values(), ids=MIXES)
def test_sinks(sequences, window):
    Case(CPU, sequences, GROUPED, window=window, sinks=True).check(CpuAttnBackend)


@pytest.mark.parametrize("kv_scales", [None, (0.4, 3.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [ALONE, WIDE])
def test_a_cache_in_fp8(kv_scales, dtype, shape):
    for sequences in MIXES.values():
        Case(CPU, sequences, shape, dtype=dtype, kv_dtype=torch.float8_e4m3fn, kv_scales=kv_scales).check(
            CpuAttnBackend
        )


@pytest.mark.parametrize("sequences", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize("rank", [32, 20])
def test_latent_attention(sequences, rank):
    Case(CPU, sequences, (16, 1, 40), rank=rank).check(CpuAttnBackend)


@pytest.mark.parametrize("cap", [0.5, 20.0])
def test_soft_caps(cap):
    for sequences in MIXES.values():
        case = Case(CPU, sequences, GROUPED)
        spec = dataclasses.replace(case.spec, soft_cap=cap)
        native = choose_attn_backend("torch_native", spec)(spec, case.pool)
        case.compare(case.run(CpuAttnBackend(spec, case.pool)), case.run(native))


def test_large_scores_overflow_nothing():
    case = Case(CPU, MIXES["mixed"], GROUPED)
    case.q = case.q * 1e4
    case.check(CpuAttnBackend)


def test_auto_takes_it_on_a_cpu_alone():
    spec = Case(CPU, MIXES["one token"], GROUPED).spec
    assert choose_attn_backend("auto", spec) is CpuAttnBackend
    with pytest.raises(ValueError, match="needs a CPU"):
        choose_attn_backend("cpu", dataclasses.replace(spec, device=torch.device("cuda")))


def test_a_pass_ends_as_it_began(monkeypatch):
    """The kernels may be there between the layers of a pass, for which PyTorch's way was planned."""
    loaded = library.library()
    case = Case(CPU, MIXES["mixed"], GROUPED, kv_dtype=torch.float8_e4m3fn, kv_scales=(0.5, 2.0))
    expected = case.native()
    monkeypatch.setattr(library, "_library", None)
    backend = CpuAttnBackend(case.spec, case.pool)
    backend.init_forward_metadata(case.batch)
    case.layer.bind(backend)
    monkeypatch.setattr(library, "_library", loaded)
    case.compare(case.layer(case.q, case.batch), expected)
    case.check_made(backend)
