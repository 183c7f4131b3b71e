"""Owns the tests of the batch sizes that get CUDA graphs; the graphs themselves need a GPU."""

import pytest
from ramet.srt.model_executor.cuda_graph_runner import CHUNK_SIZES, MAX_BATCH_SIZE, captured_shapes, graph_batch_sizes


@pytest.mark.parametrize("limit", [1, 2, 3, 16, 64, 100, 256, 512, 4000])
def test_sizes_reach_from_one_to_the_largest_batch(limit):
    sizes = graph_batch_sizes(limit)
    assert sizes == sorted(set(sizes)) and sizes[0] == 1 and sizes[-1] == min(limit, MAX_BATCH_SIZE)
    for size in range(1, sizes[-1] + 1):
        padded = next(captured for captured in sizes if captured >= size)
        assert padded - size <= max(size - 1, 0) and padded - size < 32


def test_passes_with_prompt_chunks_are_captured_where_the_backend_allows_it():
    shapes = captured_shapes(32, 10**6)
    assert [shape.num_tokens for shape in shapes if not shape.has_chunks] == graph_batch_sizes(32)
    assert [shape.num_tokens for shape in shapes if shape.has_chunks] == sorted(CHUNK_SIZES)
    assert all(not shape.has_chunks for shape in captured_shapes(32, 0))


@pytest.mark.parametrize("max_tokens", [1, 64, 65, 500, 2048])
def test_no_pass_is_captured_that_is_longer_than_there_can_be_one(max_tokens):
    sizes = [shape.num_tokens for shape in captured_shapes(32, max_tokens) if shape.has_chunks]
    assert sizes[-1] >= max_tokens and (len(sizes) == 1 or sizes[-2] < max_tokens)
