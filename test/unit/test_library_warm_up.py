"""Numbers of rows with which libraries are called, and the warm-up that has seen them all."""

import pytest
import torch
from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from ramet.srt.model_executor import library_warm_up
from ramet.srt.model_executor.library_warm_up import padded_count, padded_counts, warm_up_head, warm_up_products


@pytest.mark.parametrize("number", [0, 1, 2, 8, 9, 511, 512, 513, 2048, 2049, 8192])
def test_padding_costs_little(number):
    count = padded_count(number)
    assert number <= count < number + max(8, number // 8 + 1)
    assert padded_count(count) == count
    assert (count == number) == (number in (0, 1, 8, 512, 2048, 8192))


def test_every_number_is_padded_to_one_of_the_few():
    counts = padded_counts(2049, 8192)
    assert counts[0] == 8192 and counts == sorted(counts, reverse=True) and len(counts) < 50
    assert {padded_count(number) for number in range(2049, 8193)} == set(counts)


@pytest.fixture
def model():
    """Two equal layers and one of another shape."""
    parts = {"bias": False, "dtype": torch.float32, "parallel": ParallelConfig()}
    layers = [MergedColumnParallelLinear(8, [f"{name}.up"], [6], **parts) for name in "ab"]
    model = torch.nn.ModuleList([*layers, RowParallelLinear(8, 8, "down", **parts)])
    return model.to_empty(device="cpu")


@pytest.mark.parametrize(("is_captured", "least"), [(True, 2049), (False, 1)])
def test_a_matrix_of_each_shape_is_multiplied_with_every_number_of_rows(model, monkeypatch, is_captured, least):
    seen = []
    monkeypatch.setattr(library_warm_up, "project", lambda x, weight, bias: seen.append((len(x), tuple(weight.shape))))
    warm_up_products(model, torch.float32, 3000, is_captured)
    shapes = [(6, 8), (8, 8)]
    assert seen == [(count, shape) for shape in shapes for count in padded_counts(least, 3000)]


def test_the_head_sees_every_batch_size_and_the_largest_is_sampled(monkeypatch):
    sampled, sizes = [], []
    monkeypatch.setattr(library_warm_up, "warm_up_sampling", lambda logits: sampled.append(len(logits)))
    warm_up_head(lambda states: sizes.append(len(states)) or states, torch.zeros(1, 4), 100)
    assert sizes == padded_counts(1, 100) and sampled == [104]
