"""Owns the tests of choosing a device: what is wrong with the GPU is said in one line."""

import pytest
import torch
from ramet.srt import errors
from ramet.srt.configs import device_config
from ramet.srt.configs.device_config import free_memory_nbytes, pick_device


@pytest.fixture
def cuda(monkeypatch):
    """A torch with CUDA and one GPU, as far as choosing goes."""
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    return monkeypatch


def raising(error):
    def call(*args, **kwargs):
        raise error

    return call


def one_line(name="cuda", gpu_id=0):
    with pytest.raises(ValueError) as caught:
        pick_device(name, gpu_id)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_cpu_is_taken_where_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("cpu", 0) == pick_device("auto", 3) == torch.device("cpu")
    assert free_memory_nbytes(torch.device("cpu")) > 0


def test_a_torch_without_cuda(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    assert torch.__version__ in one_line()


def test_a_driver_that_is_missing_or_too_old(cuda):
    cuda.setattr(torch.cuda, "init", raising(RuntimeError("Found no NVIDIA driver on your system.\nPlease check")))
    assert one_line() == "--device cuda: Found no NVIDIA driver on your system. Please check"


def test_a_rank_without_a_gpu_of_its_own(cuda):
    cuda.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert one_line("auto", 1) == "there is no GPU 1 for a rank of this host: there are 1 (CUDA_VISIBLE_DEVICES=0)"


def test_a_gpu_that_somebody_else_fills(cuda):
    cuda.setattr(torch, "empty", raising(RuntimeError("CUDA error: out of memory\nFor debugging consider more")))
    assert one_line() == "GPU 0 can't be used: CUDA error: out of memory"


OUT_OF_MEMORY = """CUDA error: out of memory
Search for `cudaErrorMemoryAllocation' in https://docs.nvidia.com/cuda/cuda-runtime-api/ for more information.
CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be incorrect.
For debugging consider passing CUDA_LAUNCH_BLOCKING=1
"""


@pytest.mark.parametrize("step", ["cuda.set_device", "empty"])  # which of them makes the context depends on the GPU
def test_advice_for_developers_is_left_out(cuda, step):
    cuda.setattr(f"torch.{step}", raising(RuntimeError(OUT_OF_MEMORY)))
    assert one_line() == "GPU 0 can't be used: CUDA error: out of memory"


def test_memory_that_is_full_later_on_is_one_line_too():
    text = (
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.10 GiB is "
        "free. If reserved but unallocated memory is large try setting PYTORCH_ALLOC_CONF=expandable_segments:True"
    )
    said = errors.one_line(torch.OutOfMemoryError(text))
    assert "\n" not in said and "1.10 GiB is free. (a lower --mem-fraction-static" in said and "segments" not in said
    assert errors.one_line(RuntimeError("")) == "RuntimeError"


@pytest.mark.parametrize("visible, is_said", [(None, True), ("0", True), ("", False)])
def test_a_gpu_that_torch_cannot_use_is_not_passed_over_in_silence(cuda, caplog, tmp_path, visible, is_said):
    cuda.setattr(device_config, "DRIVER_DEVICE", str(tmp_path))
    cuda.setattr(torch.cuda, "is_available", lambda: False)
    cuda.setattr(torch.cuda, "init", raising(RuntimeError("The NVIDIA driver on your system is too old")))
    cuda.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        cuda.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert pick_device("auto", 0) == torch.device("cpu")
    assert ("runs on the CPU: --device cuda: The NVIDIA driver on your system is too old" in caplog.text) == is_said
