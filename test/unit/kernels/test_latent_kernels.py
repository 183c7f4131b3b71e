"""The kernels of latent attention against plain torch: pieces, the rows that are kept, products with kv_b_proj."""

import pytest
import torch
from attention_case import Case


def check(case):
    from ramet.srt.layers.attention.triton_backend import TritonAttnBackend

    case.check(TritonAttnBackend)


@pytest.mark.parametrize(
    ("heads", "rank", "rope"),
    [(1, 16, 2), (6, 48, 8), (16, 64, 16), (20, 40, 12), (33, 20, 6)],
    ids=str,
)
def test_few_and_many_new_tokens_behind_prefixes(device, heads, rank, rope):
    """Heads that fill a tile, leave rows of it empty, or need two; ranks that are no power of two."""
    sequences = [(140, 1), (0, 1), (17, 3), (9, 12), (0, 5)]
    check(Case(device, sequences, (heads, 1, rank + rope), rank=rank))


@pytest.mark.parametrize("page_size", [1, 16])
def test_long_sequences_beside_short_ones(device, page_size):
    """The long ones are split into pieces, the short ones not."""
    sequences = [(2, 1), (700, 1), (0, 1), (300, 1)]
    check(Case(device, sequences, (6, 1, 40), rank=32, page_size=page_size, decode=True))


def test_a_prefix_that_many_sequences_share(device):
    sequences = [(20, 1), *((256 + length, 1) for length in (0, 30, 90, 4)), (300, 1)]
    check(Case(device, sequences, (3, 1, 40), rank=32, page_size=16, decode=True, shared=[(1, 4, 256)]))


def test_the_real_size_in_half_precision(device):
    check(Case(device, [(40, 1), (20, 2)], (40, 1, 576), rank=512, page_size=64, dtype=torch.float16))


def test_long_chunks_are_split_too(device):
    check(Case(device, [(1200, 5), (90, 1)], (5, 1, 24), rank=16, page_size=32))
