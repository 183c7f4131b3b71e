"""Owns the choice of the attention backend for a model on a device, and binding the model's layers to it."""

import dataclasses

import torch
from torch import nn

from ramet.srt.layers.attention.base_attn_backend import AttentionBackend, AttentionSpec
from ramet.srt.layers.attention.radix_attention import RadixAttention
from ramet.srt.layers.attention.requirements import missing_package
from ramet.srt.mem_cache.kv_sizes import KVLayers

# What "auto" tries on a GPU, in order. Ours comes first: it is the one that was measured there.
PREFERENCE = ("triton", "flashinfer", "flash_mla", "torch_varlen", "torch_native")


def describe_attention(
    model: nn.Module,
    device: torch.device,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    page_size: int,
    stand_in: RadixAttention | None = None,
) -> AttentionSpec:
    """What the attention layers of this rank's part of a model ask of their backend.

    Args:
        stand_in: a layer of the model, for a part that has none.
    """
    layers = _attention_layers(model) or ([] if stand_in is None else [stand_in])
    shapes = {
        (
            layer.num_heads,
            dataclasses.replace(layer.kv, index_dim=0),
            layer.scale,
            layer.soft_cap,
            layer.sinks is not None,
            layer.latent,
        )
        for layer in layers
    }
    assert len(shapes) == 1, "the attention layers of a model differ in their windows and indices only"
    windows = tuple(dict.fromkeys(layer.layer.sliding_window for layer in layers))
    num_heads, kv, scale, cap, has_sinks, latent = shapes.pop()
    return AttentionSpec(device, dtype, kv_dtype, page_size, num_heads, kv, scale, windows, cap, has_sinks, latent)


def describe_kv_cache(model: nn.Module, dtype: torch.dtype, *, may_differ: bool) -> KVLayers:
    """What the attention layers of this rank's part of a model keep; see KVLayers."""
    layers = sorted(_attention_layers(model), key=lambda layer: layer.layer.layer_id)
    windows = [layer.layer.sliding_window for layer in layers]
    return KVLayers([layer.kv for layer in layers], windows, dtype, may_differ)


def bind_attention(model: nn.Module, backend: AttentionBackend) -> None:
    """Have every attention layer of a model compute with `backend`, over its KV pool."""
    for layer in _attention_layers(model):
        layer.bind(backend)


def _attention_layers(model: nn.Module) -> list[RadixAttention]:
    return [module for module in model.modules() if isinstance(module, RadixAttention)]


def choose_attn_backend(name: str, spec: AttentionSpec) -> type[AttentionBackend]:
    """The backend for --attention-backend `name`; "auto" takes the first of PREFERENCE that runs, on a GPU.

    Raises:
        ValueError: if it doesn't run here; the message says what is missing.
    """
    if spec.has_fp8_cache and spec.kv.is_latent:
        raise ValueError("--kv-cache-dtype fp8_e4m3 is not served with latent attention")
    candidates: tuple[str, ...] = (name,)
    if name == "auto":
        candidates = PREFERENCE if spec.device.type == "cuda" else ("cpu",)
        if spec.kv.is_latent and not _has_index(spec) and spec.device.type == "cuda":
            candidates = ("latent_auto", *candidates)  # Ramet's kernels, beside which libraries are measured
    obstacle: str | None = None
    for candidate in candidates:
        obstacle = missing_package("triton" if candidate == "latent_auto" else candidate)
        if obstacle is None:
            backend = _backend_class(_variant(candidate, spec))
            obstacle = backend.obstacle(spec)
            if obstacle is None:
                return backend
    raise ValueError(f"--attention-backend {name} needs {obstacle}")


def _variant(name: str, spec: AttentionSpec) -> str:
    """Which of the classes that make up a backend computes this model."""
    if name in ("cpu", "triton", "torch_native") and _has_index(spec):
        return "sparse_triton" if name == "triton" else "sparse_torch_native"
    return f"latent_{name}" if name in ("triton", "flashinfer") and spec.kv.is_latent else name


def _has_index(spec: AttentionSpec) -> bool:
    return spec.latent is not None and spec.latent.index is not None


def _backend_class(name: str) -> type[AttentionBackend]:
    """Imports what the others don't need."""
    if name == "triton":
        from ramet.srt.layers.attention.triton_backend import TritonAttnBackend

        return TritonAttnBackend
    if name == "latent_triton":
        from ramet.srt.layers.attention.latent_triton_backend import LatentTritonAttnBackend

        return LatentTritonAttnBackend
    if name in ("latent_auto", "flash_mla", "latent_flashinfer"):
        from ramet.srt.layers.attention import latent_library_backend as latent

        if name == "latent_auto":
            return latent.LatentLibraryBackend
        return latent.FlashMlaAttnBackend if name == "flash_mla" else latent.LatentFlashInferAttnBackend
    if name == "sparse_triton":
        from ramet.srt.layers.attention.sparse_triton_backend import SparseTritonAttnBackend

        return SparseTritonAttnBackend
    if name == "sparse_torch_native":
        from ramet.srt.layers.attention.sparse_native_backend import SparseNativeAttnBackend

        return SparseNativeAttnBackend
    if name == "cpu":
        from ramet.srt.layers.attention.cpu_backend import CpuAttnBackend

        return CpuAttnBackend
    if name == "flashinfer":
        from ramet.srt.layers.attention.flashinfer_backend import FlashInferAttnBackend

        return FlashInferAttnBackend
    if name == "torch_varlen":
        from ramet.srt.layers.attention.torch_varlen_backend import TorchVarlenAttnBackend

        return TorchVarlenAttnBackend
    from ramet.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    return TorchNativeAttnBackend
