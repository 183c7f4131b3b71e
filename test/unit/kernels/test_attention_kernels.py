"""The Triton attention backend against the one of PyTorch's own scaled dot product."""

import random

import pytest
import torch
from ramet.srt.layers.attention.radix_attention import RadixAttention
from ramet.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from ramet.srt.mem_cache.memory_pool import MHATokenToKVPool
from ramet.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3}
SHAPES = {  # heads, kv heads, head_dim
    "grouped": (4, 2, 16),
    "one kv head": (3, 1, 32),
    "as many kv heads": (2, 2, 24),
}


class Case:
    """A random cache and a batch of sequences in it, each of (prefix_len, new_len)."""

    def __init__(self, device, sequences, shape, *, page_size=4, window=None, dtype=torch.float32, decode=False):
        num_heads, num_kv_heads, head_dim = shape
        num_pages = sum(-(-(prefix + new) // page_size) for prefix, new in sequences) + 3
        self.page_size = page_size
        self.pool = MHATokenToKVPool(
            num_pages=num_pages, page_size=page_size, num_layers=1, num_kv_heads=num_kv_heads, head_dim=head_dim,
            dtype=dtype, device=device,
        )  # fmt: skip
        self.pool.buffer.normal_()
        self.pool.buffer[:, :, :page_size] = float("nan")  # page 0 belongs to nobody: nothing of it may show
        self.layer = RadixAttention(
            num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, layer_id=0, sliding_window=window
        )
        ends = [prefix + new for prefix, new in sequences]
        pages = list(range(1, num_pages + 1))
        random.Random(0).shuffle(pages)
        tables = torch.zeros(len(sequences), -(-max(ends) // page_size) + 1, dtype=torch.int64)
        rows, slots = [], []
        for index, (prefix, new) in enumerate(sequences):
            count = -(-(prefix + new) // page_size)
            tables[index, :count] = torch.tensor([pages.pop() for _ in range(count)])
            positions = torch.arange(prefix, prefix + new)
            slots.append(tables[index][positions // page_size] * page_size + positions % page_size)
            rows.append(positions)
        slots = torch.cat(slots).to(device)
        num_tokens = len(slots)
        width = (num_heads + 2 * num_kv_heads) * head_dim
        parts = torch.randn(num_tokens, width, device=device, dtype=dtype).unflatten(1, (-1, head_dim))
        self.q, self.k, self.v = parts.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
        self.pool.set_kv_buffer(0, slots, self.k, self.v)
        self.batch = ForwardBatch(
            forward_mode=ForwardMode.DECODE if decode else ForwardMode.EXTEND,
            input_ids=torch.zeros(num_tokens, dtype=torch.int64, device=device),
            positions=torch.cat(rows).to(device),
            out_cache_loc=slots,
            block_tables=tables.to(device),
            seq_lens=torch.tensor(ends, dtype=torch.int32, device=device),
            seq_lens_cpu=ends,
            extend_lens_cpu=[new for _, new in sequences],
            logits_rows=torch.arange(num_tokens, device=device),
            kv_pool=self.pool,
        )

    def run(self, backend):
        backend.init_forward_metadata(self.batch)
        return backend.forward(self.q, self.k, self.v, self.layer, self.batch)


def check(case):
    from ramet.srt.layers.attention.triton_backend import TritonAttnBackend

    expected = case.run(TorchNativeAttnBackend(case.page_size))
    actual = case.run(TritonAttnBackend(case.page_size))
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("window", [None, 9])
def test_decode(device, shape, window):
    check(Case(device, [(0, 1), (15, 1), (40, 1)], shape, window=window, decode=True))


@pytest.mark.parametrize("num_sequences", [1, 13])
def test_decode_with_many_and_no_splits(device, num_sequences):
    sequences = [(37 * index % 60, 1) for index in range(1, num_sequences + 1)]
    check(Case(device, sequences, (4, 2, 16), page_size=16, decode=True))


@pytest.mark.parametrize("decode", [True, False])
def test_half_precision(device, decode):
    sequences = [(20, 1), (3, 1)] if decode else [(20, 14), (0, 5)]
    check(Case(device, sequences, (4, 2, 16), dtype=torch.float16, decode=decode))


@pytest.mark.parametrize(
    "shape, window", [("grouped", None), ("grouped", 1), ("one kv head", 7), ("as many kv heads", 30)]
)
def test_prefill_behind_prefixes(device, shape, window):
    check(Case(device, [(0, 5), (17, 1), (8, 33)], SHAPES[shape], window=window))


@pytest.mark.parametrize("page_size", [1, 16])
def test_page_sizes(device, page_size):
    check(Case(device, [(18, 19), (0, 3)], (4, 2, 16), page_size=page_size))
    check(Case(device, [(18, 1), (0, 1)], (4, 2, 16), page_size=page_size, decode=True))
