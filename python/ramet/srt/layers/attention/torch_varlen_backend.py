"""Owns attention with PyTorch's variable-length kernel, which finds the keys of a sequence through a block table."""

from itertools import accumulate

import torch
import torch.nn.functional as F
from torch.nn.attention import varlen

from ramet.srt.batch.forward_batch_info import ForwardBatch, ForwardMode
from ramet.srt.layers.attention.base_attn_backend import AttentionBackend, AttentionLayer, AttentionSpec
from ramet.srt.mem_cache.memory_pool import TokenToKVPool
from ramet.srt.utils.device import to_device

PAGE_SIZE_STEP = 256  # tokens; the FlashAttention 2 kernel behind the function takes pages of a multiple of it
MAX_HEAD_DIM = 256


class TorchVarlenAttnBackend(AttentionBackend):
    """Reads keys and values where they lie. All that a decode pass needs is computed on the device, so it can be
    captured."""

    can_be_captured = True

    def __init__(self, spec: AttentionSpec, kv_pool: TokenToKVPool):
        super().__init__(spec, kv_pool)
        self._max_queries = self._max_keys = 0
        self._query_starts: torch.Tensor  # int32 [batch_size + 1]
        self._key_starts: torch.Tensor  # int32 [batch_size + 1], as if the keys stood one behind the other
        self._block_tables: torch.Tensor  # int32 [batch_size, max_pages]

    @staticmethod
    def obstacle(spec: AttentionSpec) -> str | None:
        if spec.device.type != "cuda":
            return "a GPU"
        if spec.has_sinks:
            return "a model without attention sinks"
        if spec.kv.is_latent:
            return "a model without latent attention"
        if spec.soft_cap is not None:
            return "a model without a soft cap on attention"
        if spec.has_fp8_cache:
            return "a KV cache in the model's type"
        if spec.dtype not in (torch.bfloat16, torch.float16):
            return f"bfloat16 or float16; the model has {str(spec.dtype).removeprefix('torch.')}"
        if spec.head_dim > MAX_HEAD_DIM or spec.head_dim % 8:
            return f"heads of a multiple of 8 and at most {MAX_HEAD_DIM}; the model's have {spec.head_dim}"
        if spec.page_size % PAGE_SIZE_STEP:
            return f"a --page-size that is a multiple of {PAGE_SIZE_STEP}; it is {spec.page_size}"
        return None

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        device = forward_batch.seq_lens.device
        if forward_batch.forward_mode is ForwardMode.DECODE:
            self._query_starts = torch.arange(forward_batch.batch_size + 1, dtype=torch.int32, device=device)
        else:
            starts = list(accumulate(forward_batch.extend_lens_cpu, initial=0))
            self._query_starts = to_device(starts, torch.int32, device)
        self._key_starts = F.pad(forward_batch.seq_lens.cumsum(0, dtype=torch.int32), (1, 0))
        self._block_tables = forward_batch.block_tables(self.spec.page_size).to(torch.int32)
        self._max_queries = max(forward_batch.extend_lens_cpu)
        self._max_keys = max(forward_batch.seq_lens_cpu)  # in a captured pass the most that there can be

    def forward(self, q: torch.Tensor, layer: AttentionLayer, forward_batch: ForwardBatch) -> torch.Tensor:
        k_cache, v_cache = self.kv_pool.get_kv_buffer(layer.layer_id)
        window = layer.sliding_window
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        varlen.varlen_attn_out(
            out,
            q,
            k_cache.unflatten(0, (-1, self.spec.page_size)),
            v_cache.unflatten(0, (-1, self.spec.page_size)),
            self._query_starts,
            self._key_starts,
            self._max_queries,
            self._max_keys,
            scale=self.spec.scale,
            window_size=(-1 if window is None else window - 1, 0),  # (tokens before the query, tokens behind it)
            enable_gqa=True,
            seqused_k=forward_batch.seq_lens,
            block_table=self._block_tables,
        )
        return out
