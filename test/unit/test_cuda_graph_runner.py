"""Which graph runs which pass, and with what: a graph is stood in for by one that only counts."""

import random

import numpy as np
import pytest
import torch
from ramet.srt.batch.pass_tokens import PassTokens, TokenGroups
from ramet.srt.layers.attention.base_attn_backend import CapturedShape
from ramet.srt.mem_cache.memory_pool import ReqToPagePool
from ramet.srt.model_executor.cuda_graph_runner import CudaGraphRunner

HIDDEN = 4
NUM_ROWS = 32


class Backend:
    """Remembers the passes that it prepares."""

    can_capture_chunks = True
    prefers = False
    prefers_alike = False

    def __init__(self):
        self.spec = type("Spec", (), {"device": torch.device("cpu"), "dtype": torch.float32, "page_size": 4})
        self.prepared = []

    def init_forward_metadata_replay_cuda_graph(self, shape, tokens, rows):
        self.prepared.append((shape, tokens, rows))

    def prefers_launches(self, tokens):
        return self.prefers


class Graph:
    """Writes the ids of the fixed inputs as hidden states, as the model would."""

    def __init__(self, runner, shape):
        self.runner, self.shape = runner, shape

    def replay(self):
        rows, positions, ids = self.runner._fixed_inputs(self.shape)
        hidden = torch.stack([rows, positions, ids, ids], dim=1).float()
        if self.runner._num_groups > 1:
            rows, ids = self.runner._fixed_group_inputs(self.shape)
            hidden = torch.stack([rows, ids, ids, ids], dim=1).float()
        self.runner._hidden_states[: len(hidden)].copy_(hidden)


@pytest.fixture
def make(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)

    def make(max_tokens=500, may_launch=True, can_capture_chunks=True, prefers_alike=False, **groups):
        backend = Backend()
        backend.prefers_alike = prefers_alike
        backend.can_capture_chunks = can_capture_chunks
        pool = ReqToPagePool(NUM_ROWS, 8, torch.device("cpu"))
        runner = CudaGraphRunner(None, pool, backend, NUM_ROWS, max_tokens, HIDDEN, may_launch=may_launch, **groups)
        runner._graphs = {shape: Graph(runner, shape) for shape in runner._shapes}
        return runner, backend

    return make


def make_tokens(lens):
    lens = np.array(lens)
    number = len(lens)
    return PassTokens(np.arange(number), np.arange(number) * 3, lens, np.arange(1, lens.sum() + 1))


@pytest.mark.parametrize(
    "lens, shape",
    [
        ([1], (1, False)),
        ([1] * 3, (4, False)),
        ([1] * 32, (32, False)),
        ([1] * 33, None),  # more than run at a time
        ([2], (64, True)),
        ([1, 63], (64, True)),
        ([1, 64], (128, True)),
        ([1, 300], (320, True)),
        ([512], (512, True)),
        ([513], None),
    ],
)
def test_the_smallest_graph_that_holds_a_pass_runs_it(make, lens, shape):
    runner, backend = make()
    tokens = make_tokens(lens)
    hidden = runner.replay(tokens)
    if shape is None:
        assert hidden is None and not backend.prepared
        return
    expected = np.stack([tokens.row_of_token, tokens.positions, tokens.ids, tokens.ids], axis=1)
    assert hidden.tolist() == expected.tolist()
    used, padded, rows = backend.prepared.pop()
    assert used == CapturedShape(*shape) and padded.num_tokens == shape[0]
    assert rows.tolist() == padded.row_of_token.tolist()
    assert set(padded.rows[len(lens) :]) <= {NUM_ROWS} and not padded.positions[tokens.num_tokens :].any()


def test_a_pass_leaves_nothing_in_the_padding_of_the_next(make):
    runner, backend = make()
    generator = random.Random(0)
    for _ in range(20):
        runner.replay(make_tokens([generator.randint(1, 40) for _ in range(generator.randint(1, 9))]))
        shape, padded, rows = backend.prepared.pop()
        fixed = runner._fixed_inputs(shape)
        assert fixed.tolist() == [padded.row_of_token.tolist(), padded.positions.tolist(), padded.ids.tolist()]


@pytest.mark.parametrize(("may_launch", "prefers_alike"), [(True, False), (False, False), (False, True)])
def test_ranks_that_compute_a_pass_together_all_replay_it(make, may_launch, prefers_alike):
    """Each finds its kernels at another moment, and launched and padded passes don't fit together."""
    runner, backend = make(may_launch=may_launch, prefers_alike=prefers_alike)
    backend.prefers = True
    assert (runner.replay(make_tokens([30])) is None) == (may_launch or prefers_alike)
    backend.prefers = False
    assert runner.replay(make_tokens([30])) is not None


def test_without_captured_chunks_only_decoding_passes_are_replayed(make):
    runner, _ = make(can_capture_chunks=False)
    assert runner.chunk_sizes == []
    assert runner.replay(make_tokens([2])) is None and runner.replay(make_tokens([1, 1])) is not None


def test_sizes_of_passes_with_chunks_are_said(make):
    assert make(max_tokens=200)[0].chunk_sizes == [64, 128, 192, 256]


@pytest.mark.parametrize(
    ("lens", "ends", "shape"),
    [
        ([1, 1, 1], (1, 3), (2, False)),  # by the longest group
        ([1, 1, 1], (0, 3), (4, False)),  # one has nothing to do
        ([1, 1, 70], (2, 3), (128, True)),  # one decodes while the other has a chunk
        ([1, 513], (1, 2), None),
    ],
)
@pytest.mark.parametrize("own", [0, 1])
def test_groups_of_data_parallel_attention_take_the_same_graph(make, lens, ends, shape, own):
    runner, backend = make(may_launch=False, prefers_alike=True, num_groups=2, own_group=own)
    backend.prefers = True  # which each group would say by itself
    tokens = make_tokens(lens)
    done = runner.replay_groups(TokenGroups(tokens, [slice(0, ends[0]), slice(*ends)], own))
    if shape is None:
        assert done is None and not backend.prepared
        return
    hidden, grouped = done
    assert len(hidden) == 2 * shape[0] and grouped.sizes == [shape[0]] * 2
    expected = np.stack([tokens.row_of_token, tokens.ids], axis=1)
    assert hidden[grouped.places, :2].tolist() == expected.tolist()
    used, padded, rows = backend.prepared.pop()
    assert used == CapturedShape(*shape) and padded is grouped.own and len(rows) == shape[0]
    assert runner._fixed_inputs(used)[0].tolist() == padded.row_of_token.tolist()
