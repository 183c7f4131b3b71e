"""Owns attention on CPUs: by the kernel that reads keys where they lie, once it is built; by PyTorch until then."""

import ctypes

import numpy as np
import torch

from ramet.srt.batch.forward_batch_info import ForwardBatch
from ramet.srt.layers.attention.base_attn_backend import AttentionLayer, AttentionSpec
from ramet.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from ramet.srt.layers.cpu_kernels.library import AttentionCall, library
from ramet.srt.layers.cpu_kernels.library import call as call_kernel
from ramet.srt.layers.cpu_kernels.ops import COMPUTED, DTYPES, address
from ramet.srt.mem_cache.memory_pool import TokenToKVPool


class CpuAttnBackend(TorchNativeAttnBackend):
    """A pass is computed by one of both from its beginning to its end."""

    applies_kv_scales = True

    def __init__(self, spec: AttentionSpec, kv_pool: TokenToKVPool):
        super().__init__(spec, kv_pool)
        self._calls: dict[int | None, AttentionCall] = {}  # of the pass, by window; empty: PyTorch computes it
        self._read: list[np.ndarray | torch.Tensor] = []  # what they read

    @staticmethod
    def obstacle(spec: AttentionSpec) -> str | None:
        return None if spec.device.type == "cpu" else "a CPU"

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        self._calls, self._read = {}, []
        if library() is None or self.spec.dtype not in COMPUTED:
            super().init_forward_metadata(forward_batch)
            return
        windowed = forward_batch.of_windows(self.spec.page_size)
        for window in self.spec.windows:
            batch = forward_batch if window is None else windowed
            self._calls[window] = self._plan_call(batch, window)

    def forward(self, q: torch.Tensor, layer: AttentionLayer, forward_batch: ForwardBatch) -> torch.Tensor:
        call = self._calls.get(layer.sliding_window)
        if call is None:
            out = super().forward(q if layer.kv_scales is None else q * layer.kv_scales[0], layer, forward_batch)
            return out if layer.kv_scales is None else out * layer.kv_scales[1]
        q = q.contiguous()
        keys, values = self.kv_pool.get_kv_buffer(layer.layer_id)
        sinks = None if layer.sinks is None else layer.sinks.to(q.dtype)
        out = torch.empty((*q.shape[:2], self.spec.kv.value_dim), dtype=q.dtype)
        call.q, call.keys, call.values, call.out = (part.data_ptr() for part in (q, keys, values, out))
        call.value_stride = values.stride(1)
        call.kv_scales, call.sinks = address(layer.kv_scales), address(sinks)
        call_kernel("attention", ctypes.byref(call))
        return out

    def _plan_call(self, batch: ForwardBatch, window: int | None) -> AttentionCall:
        spec, tokens = self.spec, batch.tokens
        arrays = [
            np.ascontiguousarray(part, dtype=np.int64)
            for part in (tokens.rows, tokens.starts, tokens.ends, tokens.first_tokens)
        ]
        self._read += [*arrays, batch.req_to_page]
        rows, starts, ends, first_tokens = (part.ctypes.data for part in arrays)
        return AttentionCall(
            num_sequences=len(tokens.rows), num_heads=spec.num_heads, num_kv_heads=spec.num_kv_heads,
            key_dim=spec.kv.key_dim, value_dim=spec.kv.value_dim, page_size=spec.page_size,
            table_stride=batch.req_to_page.stride(0), window=window or 0, rows=rows, starts=starts, ends=ends,
            first_tokens=first_tokens, req_to_page=batch.req_to_page.data_ptr(), scale=spec.scale,
            soft_cap=spec.soft_cap or 0.0, dtype=DTYPES[spec.dtype], cache_dtype=DTYPES[spec.kv_dtype],
        )  # fmt: skip
