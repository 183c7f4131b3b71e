"""Owns the choice of the attention backend for a device."""

import torch

from ramet.srt.layers.attention.base_attn_backend import AttentionBackend
from ramet.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from ramet.srt.layers.kernels.runtime import can_run_kernels


def make_attn_backend(name: str, device: torch.device, page_size: int) -> AttentionBackend:
    """The backend for --attention-backend `name`; "auto" is Triton on a GPU and torch_native elsewhere.

    Raises:
        ValueError: if it doesn't run here.
    """
    if name == "triton" and not can_run_kernels(device):
        raise ValueError("--attention-backend triton needs a GPU and the package triton")
    if name == "triton" or (name == "auto" and device.type == "cuda" and can_run_kernels(device)):
        from ramet.srt.layers.attention.triton_backend import TritonAttnBackend

        return TritonAttnBackend(page_size)
    return TorchNativeAttnBackend(page_size)
