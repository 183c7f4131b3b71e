"""Makes random paged caches with batches of sequences in them, for tests that compare attention backends."""

import random

import numpy as np
import torch
from ramet.srt.batch.batch_plan import SharedPrefix
from ramet.srt.batch.forward_batch_info import ForwardBatch, ForwardMode
from ramet.srt.batch.pass_tokens import PassTokens
from ramet.srt.configs.latent_config import LatentTraits
from ramet.srt.layers.attention.base_attn_backend import AttentionSpec
from ramet.srt.layers.attention.radix_attention import RadixAttention
from ramet.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from ramet.srt.mem_cache.memory_pool import KVSpec, TokenToKVPool

TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


class Case:
    """A random cache and a batch of sequences in it, each of (prefix_len, new_len)."""

    def __init__(
        self, device, sequences, shape, *, page_size=4, window=None, dtype=torch.float32, kv_dtype=None, decode=False,
        kv_scales=None, sinks=False, pool=None, shared=(), rank=None, index=None,
    ):  # fmt: skip
        """
        Args:
            shared: (first sequence, number of sequences, tokens) whose pages are the same.
            kv_dtype: of the cache, where it is another one.
            sinks: whether heads have sinks, which weigh as much as the keys or more.
            kv_scales: of keys and values in an fp8 cache.
            rank: with latent attention, of which the shape has one KV head: values are the keys' first columns.
            index: beside latent attention, a sparse one: IndexTraits.
            pool: of another case, for its backend to be used again; what is in it is replaced.
        """
        num_heads, num_kv_heads, head_dim = shape
        index_dim = 0 if index is None else index.head_dim
        kv = KVSpec(num_kv_heads, head_dim, rank or head_dim, is_latent=rank is not None, index_dim=index_dim)
        self.latent = None
        if index is not None:
            self.latent = LatentTraits(q_rank=8, kv_rank=rank, nope_dim=8, rope_dim=head_dim - rank, value_dim=8,
                                       is_interleaved=True, index=index)  # fmt: skip
        num_pages = sum(-(-(prefix + new) // page_size) for prefix, new in sequences) + 3
        self.device = device
        self.page_size = page_size
        self.pool = pool or TokenToKVPool(
            num_pages=num_pages, page_size=page_size, layers=[kv], dtype=kv_dtype or dtype, device=device,
        )  # fmt: skip
        self.pool.buffer.copy_(torch.randn(self.pool.buffer.shape, device=device))
        self.layer = RadixAttention(
            num_heads=num_heads,
            kv=kv,
            scale=head_dim**-0.5,
            layer_id=0,
            sliding_window=window,
            sinks=torch.nn.Parameter(3 * torch.randn(num_heads, device=device, dtype=dtype)) if sinks else None,
        )
        if kv_scales is not None:
            self.layer.kv_scales = torch.nn.Parameter(torch.tensor(kv_scales, device=device), requires_grad=False)
        ends = [prefix + new for prefix, new in sequences]
        pages = list(range(1, num_pages + 1))  # a pool of another case may have more
        random.Random(0).shuffle(pages)
        tables = torch.zeros(len(sequences), -(-max(ends) // page_size) + 1, dtype=torch.int64)
        rows, slots = [], []
        for index, (prefix, new) in enumerate(sequences):
            count = -(-(prefix + new) // page_size)
            tables[index, :count] = torch.tensor([pages.pop() for _ in range(count)])
            for first, number, length in shared:
                if first < index < first + number:
                    tables[index, : length // page_size] = tables[first, : length // page_size]
            positions = torch.arange(prefix, prefix + new)
            slots.append(tables[index][positions // page_size] * page_size + positions % page_size)
            rows.append(positions)
        is_held = torch.zeros(len(self.pool.get_kv_buffer(0)[0]), dtype=torch.bool)
        for table, end in zip(tables, ends, strict=True):
            positions = torch.arange(end)
            is_held[table[positions // page_size] * page_size + positions % page_size] = True
        self.fill(~is_held.to(device), float("nan"))  # nothing shows of what belongs to no sequence
        slots = torch.cat(slots).to(device)
        num_tokens = len(slots)
        width = (num_heads + 2 * num_kv_heads) * head_dim
        parts = torch.randn(num_tokens, width, device=device, dtype=dtype).unflatten(1, (-1, head_dim))
        self.q, k, v = parts.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
        if kv.is_latent:
            self.pool.get_kv_buffer(0)[0].index_copy_(0, slots, k)
            self.q = self.q.contiguous()
        else:
            self.pool.set_kv_buffer(0, slots, k, v, self.layer.kv_scales)
        self.batch = ForwardBatch(
            forward_mode=ForwardMode.DECODE if decode else ForwardMode.EXTEND,
            input_ids=torch.zeros(num_tokens, dtype=torch.int64, device=device),
            positions=torch.cat(rows).to(device),
            out_cache_loc=slots,
            req_to_page=tables.to(device),
            rows=torch.arange(len(sequences), device=device),
            seq_lens=torch.tensor(ends, dtype=torch.int32, device=device),
            tokens=PassTokens(
                np.arange(len(sequences)),
                np.array([prefix for prefix, _ in sequences]),
                np.array([new for _, new in sequences]),
                np.zeros(num_tokens, dtype=np.int64),
                [SharedPrefix(*prefix) for prefix in shared],
            ),
        )

    def fill(self, slots, value):
        """Put a value into slots of the cache, a slice or bool [num_slots]."""
        parts = self.pool.get_kv_buffer(0)
        for part in parts if self.latent is None else (*parts, self.pool.get_index_keys(0)):
            # As bytes, since torch puts no fp8 numbers into masked places.
            row = torch.full(part.shape[1:], value, device=part.device).to(part.dtype)
            part.view(torch.uint8)[slots] = row.view(torch.uint8)

    @property
    def spec(self) -> AttentionSpec:
        layer = self.layer
        return AttentionSpec(
            device=self.device,
            dtype=self.q.dtype,
            kv_dtype=self.pool.buffer.dtype,
            page_size=self.page_size,
            num_heads=layer.num_heads,
            kv=layer.kv,
            scale=layer.scale,
            windows=(layer.layer.sliding_window,),
            has_sinks=layer.sinks is not None,
            latent=self.latent,
        )

    def run(self, backend):
        backend.init_forward_metadata(self.batch)
        self.layer.bind(backend)
        return self.layer(self.q, self.batch)

    def check(self, backend_class):
        """The backend must give what torch_native gives."""
        self.check_made(backend_class(self.spec, self.pool))

    def check_made(self, backend):
        """The same for a backend that is there already, over this case's pool."""
        self.compare(self.run(backend), self.native())

    def native(self):
        return self.run(TorchNativeAttnBackend(self.spec, self.pool))

    def compare(self, actual, expected):
        tolerance = TOLERANCE[expected.dtype]
        torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)
