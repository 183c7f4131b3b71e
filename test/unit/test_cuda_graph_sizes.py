"""Owns the tests of the batch sizes that get CUDA graphs; the graphs themselves need a GPU."""

import pytest
from ramet.srt.model_executor.cuda_graph_runner import MAX_BATCH_SIZE, graph_batch_sizes


@pytest.mark.parametrize("limit", [1, 2, 3, 16, 64, 100, 256, 512, 4000])
def test_sizes_reach_from_one_to_the_largest_batch(limit):
    sizes = graph_batch_sizes(limit)
    assert sizes == sorted(set(sizes)) and sizes[0] == 1 and sizes[-1] == min(limit, MAX_BATCH_SIZE)
    for size in range(1, sizes[-1] + 1):
        padded = next(captured for captured in sizes if captured >= size)
        assert padded - size <= max(size - 1, 0) and padded - size < 32
