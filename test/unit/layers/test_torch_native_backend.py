"""The torch_native backend: its numbers against a plain reference, and how often it calls PyTorch's attention."""

import dataclasses

import pytest
import torch
from attention_case import Case
from ramet.srt.layers.attention import torch_native_backend
from ramet.srt.layers.attention.torch_native_backend import MAX_PADDING, TorchNativeAttnBackend, group_by_length
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")
GROUPED, ALONE = (4, 2, 16), (2, 2, 24)  # heads, kv heads, head_dim
MIXES = {
    "one": [(6, 1)],
    "alike": [(7, 1)] * 5,
    "unlike": [(60, 1), (2, 1), (0, 1), (63, 1), (3, 1), (200, 1)],
    "one long among short ones": [(9, 1), (300, 1), (8, 1), (7, 1)],
    "mixed, single tokens between chunks": [(40, 1), (0, 9), (15, 1), (8, 33), (39, 1), (14, 1), (0, 1)],
}
FAMILIES = {  # sequences, and which share a prefix
    "alike": ([(40, 1)] * 4, [(0, 4, 32)]),
    "unlike": ([(32, 1), (80, 1), (33, 1), (32, 1), (5, 1)], [(0, 4, 32)]),
    "two, and others between chunks": (
        [(0, 5), (20, 1), (17, 1), (3, 1), (48, 1), (32, 7), (35, 1), (34, 1)],
        [(1, 2, 16), (4, 4, 32)],
    ),
}


def reference(case):
    """Token by token, with the softmax written out."""
    keys, values = (part.float() for part in case.pool.get_kv_buffer(0))
    window, scale = case.layer.layer.sliding_window, case.layer.scale
    rows = case.batch.tokens.row_of_token.tolist()
    results = []
    for q, row, last in zip(case.q.float(), rows, case.batch.positions.tolist(), strict=True):
        positions = torch.arange(0 if window is None else max(0, last + 1 - window), last + 1)
        slots = case.batch.req_to_page[row][positions // case.page_size] * case.page_size + positions % case.page_size
        k, v = (part[slots].repeat_interleave(len(q) // part.shape[1], dim=1) for part in (keys, values))
        scores = torch.einsum("hd,khd->hk", q, k) * scale
        if case.layer.sinks is not None:  # which take part in the softmax, and have no values
            scores = torch.cat([scores, case.layer.sinks.float().unsqueeze(1)], dim=1)
        results.append(torch.einsum("hk,khd->hd", scores.softmax(dim=-1)[:, : len(k)], v))
    return torch.stack(results).to(case.q.dtype)


def spoil_what_nobody_sees(case):
    """NaN in every slot that is of no token which the pass sees: nothing of it may show."""
    window = case.layer.layer.sliding_window
    unseen = torch.ones(len(case.pool.get_kv_buffer(0)[0]), dtype=torch.bool)
    tokens = case.batch.tokens
    for row, start, end in zip(tokens.rows.tolist(), tokens.starts.tolist(), tokens.ends.tolist(), strict=True):
        positions = torch.arange(0 if window is None else max(0, start + 1 - window), end)
        pages = case.batch.req_to_page[row][positions // case.page_size]
        unseen[pages * case.page_size + positions % case.page_size] = False
    case.fill(unseen, float("nan"))


@pytest.mark.parametrize("shared", [(), ((1, 3, 600),)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latent_rows(shared, dtype, monkeypatch):
    """Values are the first columns of the keys; what is behind them must not come out."""
    monkeypatch.setattr(torch_native_backend, "MIN_SHARED_NBYTES", 1)
    sequences = [(40, 1), (605, 1), (601, 1), (640, 1), (0, 9), (33, 5)]
    check(Case(CPU, sequences, (5, 1, 28), rank=20, page_size=8, shared=shared, dtype=dtype))


def check(case):
    spoil_what_nobody_sees(case)
    case.compare(case.native(), reference(case))


class Counted(TorchFunctionMode):
    """Counts calls of attention and the keys that are gathered for it."""

    def __init__(self):
        super().__init__()
        self.num_calls = self.num_gathered = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.num_calls += "scaled_dot_product" in str(func)
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.index_select and result.dim() == 3:
            self.num_gathered += len(result) / 2  # values are gathered, too
        return result


def count(case):
    backend = TorchNativeAttnBackend(case.spec, case.pool)
    backend.init_forward_metadata(case.batch)
    case.layer.bind(backend)
    with torch.inference_mode(), Counted() as counted:
        case.layer(case.q, case.batch)
    return counted


@pytest.fixture
def families_pay(monkeypatch):
    """A prefix of few keys is read once, too."""
    monkeypatch.setattr(torch_native_backend, "MIN_SHARED_NBYTES", 1)


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("window", [None, 1, 9])
@pytest.mark.parametrize("sequences", MIXES.values(), ids=MIXES)
def test_mixes(sequences, window, page_size):
    check(Case(CPU, sequences, GROUPED, window=window, page_size=page_size))


@pytest.mark.parametrize("window", [None, 9])
def test_sinks(families_pay, window):
    for sequences in MIXES.values():
        check(Case(CPU, sequences, GROUPED, window=window, sinks=True))
    for sequences, shared in FAMILIES.values():
        check(Case(CPU, sequences, GROUPED, window=window, sinks=True, shared=shared))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(families_pay, dtype):
    for sequences in MIXES.values():
        check(Case(CPU, sequences, ALONE, dtype=dtype))
    for sequences, shared in FAMILIES.values():
        check(Case(CPU, sequences, GROUPED, dtype=dtype, shared=shared))


@pytest.mark.parametrize("name", MIXES)
def test_small_groups(monkeypatch, name):
    """Groups are cut where more keys would not stay in a core's cache."""
    case = Case(CPU, MIXES[name], GROUPED)
    counted = count(case)
    monkeypatch.setattr(torch_native_backend, "GATHERED_NBYTES", 1)
    cut = count(case)
    assert cut.num_calls == len(MIXES[name]) and cut.num_gathered <= counted.num_gathered
    check(case)


@pytest.mark.parametrize(
    ("sequences", "num_calls"),
    [
        ([(50, 1)] * 16, 1),
        ([(50, 1)] * 16 + [(0, 30)], 2),
        ([(50, 1), (0, 30), (48, 1), (10, 20), (51, 1)], 3),
        ([(20, 1)] * 7 + [(600, 1)] + [(21, 1)] * 8, 2),
        ([(20, 1), (200, 1)] * 8 + [(0, 30)], 3),
    ],
)
def test_single_tokens_of_similar_lengths_attend_together(sequences, num_calls):
    counted = count(Case(CPU, sequences, GROUPED))
    assert counted.num_calls == num_calls
    assert counted.num_gathered <= MAX_PADDING * sum(prefix + new for prefix, new in sequences)


def test_windows_make_lengths_alike():
    sequences = [(20, 1), (200, 1), (60, 1), (17, 1)]
    assert count(Case(CPU, sequences, GROUPED)).num_calls == 3
    assert count(Case(CPU, sequences, GROUPED, window=16)).num_calls == 1


@pytest.mark.parametrize("lengths", [[], [1], [5] * 9, [1, 2, 3, 4, 100, 7, 99], list(range(1, 60)), [1000, 1, 1, 1]])
@pytest.mark.parametrize("most", [None, 1, 40, 300])
def test_groups(lengths, most):
    groups = group_by_length(lengths, most)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        longest, num_keys = lengths[group[0]], sum(lengths[index] for index in group)
        assert longest == max(lengths[index] for index in group)
        assert longest * len(group) <= MAX_PADDING * num_keys
        assert most is None or len(group) == 1 or longest * len(group) <= most


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("name", FAMILIES)
def test_families(families_pay, name, page_size):
    sequences, shared = FAMILIES[name]
    check(Case(CPU, sequences, GROUPED, page_size=page_size, shared=shared))


def test_a_common_prefix_is_gathered_once(families_pay):
    case = Case(CPU, [(40, 1)] * 8, GROUPED, shared=[(0, 8, 32)])
    counted = count(case)
    assert counted.num_calls == 2
    assert counted.num_gathered == 32 + 8 * 9


def test_a_short_prefix_is_gathered_with_the_rest():
    case = Case(CPU, [(40, 1)] * 8, GROUPED, shared=[(0, 8, 32)])
    assert count(case).num_calls == 1


@pytest.mark.parametrize(("window", "num_calls"), [(9, 1), (40, 1), (41, 2), (100, 2)])
def test_a_window_must_hold_all_of_a_prefix(families_pay, window, num_calls):
    case = Case(CPU, [(40, 1)] * 4, GROUPED, window=window, shared=[(0, 4, 32)])
    assert count(case).num_calls == num_calls
    check(case)


@pytest.mark.parametrize("factor", [-100.0, 100.0])
def test_the_prefix_may_have_all_of_the_weight_or_nothing(families_pay, factor):
    """Scores far apart: no exponential may overflow when the results are combined."""
    case = Case(CPU, [(8, 1)] * 2, GROUPED, shared=[(0, 2, 8)])
    keys, _ = case.pool.get_kv_buffer(0)
    case.q = torch.full_like(case.q, 10.0)
    keys[:] = 1.0
    keys.unflatten(0, (-1, case.page_size))[case.batch.req_to_page[0, :2]] = factor
    check(case)


def test_layers_with_and_without_a_window(families_pay):
    sequences, shared = FAMILIES["two, and others between chunks"]
    full = Case(CPU, sequences, GROUPED, shared=shared)
    windowed = Case(CPU, sequences, GROUPED, window=5, pool=full.pool)
    backend = TorchNativeAttnBackend(dataclasses.replace(full.spec, windows=(None, 5)), full.pool)
    case = Case(CPU, sequences, GROUPED, shared=shared, pool=full.pool)
    backend.init_forward_metadata(case.batch)
    for layer in (full.layer, windowed.layer, full.layer):
        case.layer = layer
        layer.bind(backend)
        case.compare(layer(case.q, case.batch), reference(case))
