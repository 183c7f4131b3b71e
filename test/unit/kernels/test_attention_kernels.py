"""The Triton attention backend against the one of PyTorch's own scaled dot product."""

import numpy as np
import pytest
import random_models as rm
import torch
from attention_case import Case
from engine_harness import EngineHarness
from ramet.srt.layers.attention import key_splits

SHAPES = {  # heads, kv heads, head_dim
    "grouped": (4, 2, 16),
    "one kv head": (3, 1, 32),
    "as many kv heads": (2, 2, 24),
}


def check(case):
    from ramet.srt.layers.attention.triton_backend import TritonAttnBackend

    case.check(TritonAttnBackend)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("window", [None, 9])
def test_decode(device, shape, window):
    check(Case(device, [(0, 1), (15, 1), (40, 1)], shape, window=window, decode=True))


@pytest.mark.parametrize("window", [None, 70, 300])
@pytest.mark.parametrize("page_size", [1, 16])
def test_long_sequences_beside_short_ones(device, window, page_size):
    """The long ones are split into pieces, the short ones not."""
    sequences = [(2, 1), (700, 1), (0, 1), (300, 1)]
    check(Case(device, sequences, (4, 2, 16), window=window, page_size=page_size, decode=True))


@pytest.mark.parametrize("window", [None, 200])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_prefix_that_many_sequences_share(device, shape, window):
    """Also of a window that the prefix reaches beyond: then each sequence reads its own keys."""
    sequences = [(20, 1), *((256 + length, 1) for length in (0, 30, 90, 4)), (300, 1)]
    case = Case(device, sequences, shape, page_size=16, window=window, decode=True, shared=[(1, 4, 256)])
    check(case)


@pytest.mark.parametrize("window", [None, 100])
def test_few_and_many_new_tokens_behind_long_prefixes(device, window):
    """As in a pass of decoding requests, drafts that are verified and prompt chunks; the chunks are split, too."""
    check(Case(device, [(300, 1), (200, 3), (0, 2), (500, 40), (3, 1)], (4, 2, 16), window=window))


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


@pytest.mark.parametrize("group", [3, 5, 7, 20])
def test_groups_that_are_no_power_of_two(device, group):
    """A tile has rows that no head stands in; with 20 heads it holds one sequence, or a token and a half of a chunk."""
    check(Case(device, [(40, 1), (0, 3), (17, 9)], (group, 1, 16), window=30))


@pytest.mark.parametrize("head_dim, page_size", [(64, 256), (80, 8), (96, 2), (256, 32)])
def test_head_sizes(device, head_dim, page_size):
    check(Case(device, [(page_size - 1, 1), (page_size, 1), (0, 20)], (2, 1, head_dim), page_size=page_size))


@pytest.mark.parametrize("window", [3, 4, 5, 127, 128, 129])
def test_windows_at_the_borders_of_pages_and_steps(device, window):
    sequences = [(start, 1) for start in (window - 2, window - 1, window, window + 1)] + [(window - 1, 10)]
    check(Case(device, sequences, (2, 1, 16), window=window))


def test_a_cache_of_more_elements_than_32_bits_count(device, monkeypatch):
    """Slots lie so far apart that the last pages are beyond; memory is only touched there."""
    if device.type != "cpu":
        pytest.skip("takes the memory that it has")
    page_size, slot_stride, num_slots = 16, 2**16, 2**15 + 256
    case = Case(device, [(20, 1), (0, 18)], (2, 1, 16), page_size=page_size, dtype=torch.float16)
    expected, filled = case.native(), case.pool.get_kv_buffer(0)
    first = num_slots - filled[0].shape[0]
    memory = torch.from_numpy(np.zeros(num_slots * slot_stride, dtype=np.float16))
    caches = [memory.as_strided((num_slots, 1, 16), (slot_stride, 16, 1), offset) for offset in (0, 16)]
    for cache, part in zip(caches, filled, strict=True):
        cache[first:] = part
    assert first * slot_stride > 2**31
    case.batch.req_to_page += first // page_size
    monkeypatch.setattr(case.pool, "get_kv_buffer", lambda layer_id: caches)
    from ramet.srt.layers.attention.triton_backend import TritonAttnBackend

    case.compare(case.run(TritonAttnBackend(case.spec, case.pool)), expected)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return rm.make_model(tmp_path_factory.mktemp("model"), "llama3", num_hidden_layers=1)


def test_an_engine_gives_the_same_tokens_where_a_prefix_is_read_once(device, folder, monkeypatch):
    monkeypatch.setattr(key_splits, "MIN_SHARED_KEYS", 8)
    stem, *ends = rm.random_prompts([8, 2, 3])
    prompts = [stem + end for end in ends]
    settings = {"page_size": 4, "device": device.type}
    expected = EngineHarness(folder, **settings, disable_radix_cache=True).generate(prompts, max_new_tokens=3)
    engine = EngineHarness(folder, **settings, attention_backend="triton")
    shared, share = [], key_splits.KeySplitter._share
    monkeypatch.setattr(key_splits.KeySplitter, "_share", lambda *args: shared.append(share(*args)) or shared[-1])
    results = engine.generate(prompts, max_new_tokens=3)
    assert [result.token_ids for result in results] == [result.token_ids for result in expected]
    assert any(len(units) for units in shared)


@pytest.mark.parametrize(("scales", "dtype"), [(None, torch.float16), ((0.4, 3.0), torch.float32)])
def test_a_cache_in_fp8(device, scales, dtype):
    """Single tokens, chunks behind prefixes and sequences in pieces; the values of scales show in the results."""
    options = {"dtype": dtype, "kv_dtype": torch.float8_e4m3fn, "kv_scales": scales}
    check(Case(device, [(0, 1), (300, 1)], (4, 2, 16), page_size=16, decode=True, **options))
    check(Case(device, [(0, 5), (17, 1), (8, 33)], (3, 1, 24), window=9, **options))


@pytest.mark.parametrize(("window", "kv_dtype"), [(None, None), (9, torch.float8_e4m3fn)])
def test_sinks(device, window, kv_dtype):
    """Single tokens, chunks behind prefixes and sequences in pieces, whose sinks count once."""
    options = {"sinks": True, "window": window, "kv_dtype": kv_dtype}
    check(Case(device, [(0, 1), (300, 1)], (4, 2, 16), page_size=16, decode=True, **options))
    check(Case(device, [(0, 5), (17, 1), (150, 20)], (6, 2, 24), **options))


def test_layers_with_a_window_find_their_own_pages(device, tmp_path):
    """A request that is longer than what those layers keep of it."""
    folder = rm.make_model(tmp_path, "gpt_oss", sliding_window=5, num_hidden_layers=2, max_position_embeddings=64)
    settings = {"page_size": 2, "device": device.type, "max_running_requests": 1, "max_total_tokens": 64}
    engine = EngineHarness(folder, **settings, chunked_prefill_size=4, attention_backend="triton")
    windows = engine.runner.windows
    assert windows is not None and windows.num_pages < 32
    prompts = rm.random_prompts([13])
    results = engine.generate(prompts, max_new_tokens=2)
    assert [result.token_ids for result in results] == rm.hf_greedy(folder, prompts, 2)
