"""Which attention backend is taken, and what is said where one can't be."""

import dataclasses
import sys
import time

import pytest
import torch
from ramet.srt.entrypoints.instance import Instance
from ramet.srt.flags.runtime_flags import ATTENTION_BACKENDS
from ramet.srt.layers.attention import registry, requirements
from ramet.srt.layers.attention.base_attn_backend import AttentionBackend, AttentionSpec
from ramet.srt.layers.attention.registry import choose_attn_backend
from ramet.srt.mem_cache.memory_pool import KVSpec
from ramet.srt.server_args import ServerArgs

SPEC = AttentionSpec(
    device=torch.device("cuda"), dtype=torch.bfloat16, kv_dtype=torch.bfloat16, page_size=256, num_heads=8,
    kv=KVSpec(2, 128, 128), scale=128**-0.5, windows=(None,),
)  # fmt: skip


@pytest.fixture(autouse=True)
def fp8_units(monkeypatch):
    monkeypatch.setattr("ramet.srt.layers.attention.triton_backend.has_fp8_units", lambda device: True)


def packages(monkeypatch, *names, torch_version="2.13.0+cu130"):
    """Only these of the optional packages are installed."""
    monkeypatch.setattr(requirements.importlib.util, "find_spec", lambda name: name if name in names else None)
    monkeypatch.setattr(requirements.importlib.metadata, "version", lambda name: torch_version)


class Named(AttentionBackend):
    """Stands in for a backend that needs packages which aren't installed."""

    init_forward_metadata = forward = None


@pytest.fixture
def named(monkeypatch):
    """The real backends say what they need; what is chosen is only a name."""
    real = registry._backend_class

    def stand_in(name):
        return type(name, (Named,), {"obstacle": staticmethod(real(name).obstacle)})

    monkeypatch.setattr(registry, "_backend_class", stand_in)
    monkeypatch.setitem(sys.modules, "flashinfer", object())
    pytest.importorskip("triton", reason="Triton is not installed")


def test_flag_and_preference_name_the_same_backends():
    assert set(registry.PREFERENCE) | {"auto", "cpu"} == set(ATTENTION_BACKENDS)


@pytest.mark.parametrize(
    ("installed", "torch_version", "changes", "wanted"),
    [
        (("triton", "flashinfer"), "2.13.0", {}, "triton"),
        (("triton", "flashinfer"), "2.13.0", {"dtype": torch.float32, "kv": KVSpec(2, 24, 24)}, "triton"),
        (("flashinfer",), "2.13.0", {}, "flashinfer"),
        (("flashinfer",), "2.13.0", {"kv": KVSpec(2, 96, 96)}, "torch_varlen"),
        (("flashinfer",), "2.13.0", {"dtype": torch.float32}, "torch_native"),
        ((), "2.13.0", {}, "torch_varlen"),
        ((), "2.14.0a0+git1234", {}, "torch_varlen"),
        ((), "2.13.0", {"page_size": 16}, "torch_native"),
        ((), "2.13.0", {"soft_cap": 50.0}, "torch_native"),
        ((), "2.11.0", {}, "torch_native"),
        (("triton", "flashinfer"), "2.13.0", {"device": torch.device("cpu")}, "cpu"),
        (("triton", "flashinfer"), "2.13.0", {"kv_dtype": torch.float8_e4m3fn}, "triton"),
        (("flashinfer",), "2.13.0", {"kv_dtype": torch.float8_e4m3fn}, "flashinfer"),
        ((), "2.13.0", {"kv_dtype": torch.float8_e4m3fn}, "torch_native"),
    ],
)
def test_auto_takes_the_first_that_runs(monkeypatch, named, installed, torch_version, changes, wanted):
    packages(monkeypatch, *installed, torch_version=torch_version)
    assert choose_attn_backend("auto", dataclasses.replace(SPEC, **changes)).__name__ == wanted


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("flashinfer", {"dtype": torch.float32}, "flashinfer needs bfloat16 or float16; the model has float32"),
        ("flashinfer", {"kv": KVSpec(2, 96, 96)}, "flashinfer needs heads of 64, 128, 256; the model's have 96"),
        ("torch_varlen", {"page_size": 16}, "torch_varlen needs a --page-size that is a multiple of 256; it is 16"),
        ("torch_varlen", {"kv": KVSpec(2, 20, 20)}, "torch_varlen needs heads of a multiple of 8 and at most 256"),
        ("flashinfer", {"soft_cap": 50.0}, "flashinfer needs a model without a soft cap on attention"),
        ("torch_varlen", {"soft_cap": 50.0}, "torch_varlen needs a model without a soft cap on attention"),
        ("torch_varlen", {"kv_dtype": torch.float8_e4m3fn}, "torch_varlen needs a KV cache in the model's type"),
        ("flashinfer", {"device": torch.device("cpu")}, "flashinfer needs a GPU"),
        ("torch_varlen", {"device": torch.device("cpu")}, "torch_varlen needs a GPU"),
    ],
)
def test_what_a_backend_needs_of_model_and_device(monkeypatch, named, name, changes, message):
    packages(monkeypatch, "triton", "flashinfer")
    with pytest.raises(ValueError, match=f"--attention-backend {message}"):
        choose_attn_backend(name, dataclasses.replace(SPEC, **changes))


def test_an_older_gpu_has_no_kernel_for_a_cache_in_fp8(monkeypatch, named):
    packages(monkeypatch, "triton")
    monkeypatch.setattr("ramet.srt.layers.attention.triton_backend.has_fp8_units", lambda device: False)
    spec = dataclasses.replace(SPEC, kv_dtype=torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="triton needs a GPU of compute capability 8.9 or more for a KV cache in fp8"):
        choose_attn_backend("triton", spec)
    assert choose_attn_backend("auto", spec).__name__ == "torch_native"


def test_a_flashinfer_that_cannot_be_imported(monkeypatch, named):
    packages(monkeypatch, "flashinfer")
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    with pytest.raises(ValueError, match="needs the package flashinfer, which can't be imported"):
        choose_attn_backend("flashinfer", SPEC)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("triton", "needs the package triton, which is not installed"),
        ("flashinfer", r"needs the package flashinfer, which is not installed \(pip install flashinfer-python\)"),
        ("torch_varlen", r"needs torch 2\.13 or newer; this is 2\.11\.0"),
    ],
)
def test_what_is_not_installed_is_said_before_anything_starts(monkeypatch, name, message):
    packages(monkeypatch, torch_version="2.11.0")
    args = ServerArgs(model_path="no-such-folder", attention_backend=name)
    with pytest.raises(ValueError, match=f"--attention-backend {name} {message}"):
        Instance(args, time.monotonic()).start()
