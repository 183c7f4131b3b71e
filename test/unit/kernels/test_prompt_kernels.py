"""Kernels of other libraries for long prompts, with stand-ins that compute what they are asked: as part of passes."""

import dataclasses
import importlib
import inspect
import logging
import sys
from types import SimpleNamespace

import fake_cudnn
import fake_flash_attention
import fake_flashinfer
import pytest
import torch
from attention_case import Case
from ramet.srt.batch.forward_batch_info import ForwardMode
from ramet.srt.layers.attention.base_attn_backend import CapturedShape, PassLimits
from ramet.srt.layers.attention.prompts import cudnn_prompts, flashinfer_prompts
from ramet.srt.layers.attention.prompts.cudnn_prompts import ALONE, CudnnPrompts
from ramet.srt.layers.attention.prompts.flash_prompts import FlashPrompts
from ramet.srt.layers.attention.prompts.flashinfer_prompts import FlashInferPrompts
from ramet.srt.mem_cache.memory_pool import ReqToPagePool
from ramet.srt.model_executor.pass_batch import make_captured_batch, token_inputs

KINDS = {"cudnn": CudnnPrompts, "flash_attention_3": FlashPrompts, "flashinfer": FlashInferPrompts}
SHAPE = (4, 2, 16)  # heads, kv heads, head_dim
SEQUENCES = {  # tokens before the pass, new ones; of more than 8 they are chunks, of at least 40 in cuDNN's way alone
    "one": [(0, 33)],
    "behind a prefix": [(21, 12)],
    "decoding ones before and between": [(30, 1), (5, 1), (0, 17), (3, 2), (8, 9), (2, 1), (16, 16)],
    "alone and together": [(7, 1), (0, 48), (3, 9), (40, 41), (1, 10), (0, 3)],
}


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch, device):
    monkeypatch.setitem(sys.modules, "cudnn", fake_cudnn)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", fake_flash_attention)
    monkeypatch.setitem(sys.modules, "flashinfer", fake_flashinfer)
    monkeypatch.setattr(flashinfer_prompts, "WORKSPACE_NBYTES", 16)
    monkeypatch.setattr("ramet.srt.layers.attention.triton_backend.MIN_PROMPT_TOKENS", 1)
    monkeypatch.setattr(cudnn_prompts, "MIN_ALONE_TOKENS", 40)
    fake_cudnn.GRAPHS.clear()
    fake_flash_attention.CALLS.clear()


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def limits_of(case):
    return PassLimits(
        max_tokens=int(case.batch.tokens.lens.max()),
        max_keys=case.batch.req_to_page.shape[1] * case.page_size,
        num_pages=case.pool.get_kv_buffer(0)[0].shape[0] // case.page_size,
    )


def make_backend(case, prompts):
    from ramet.srt.layers.attention.triton_backend import TritonAttnBackend

    backend = TritonAttnBackend(case.spec, case.pool)
    backend._choice = SimpleNamespace(chosen=prompts)
    return backend


def check(case, kind):
    prompts = kind(case.spec, limits_of(case))
    backend = make_backend(case, prompts)
    case.check_made(backend)
    assert backend._prompts is prompts and len(backend._current[case.layer.layer.sliding_window].large) == 0


@pytest.mark.parametrize("window", [None, 1, 9])
@pytest.mark.parametrize("sequences", SEQUENCES.values(), ids=SEQUENCES)
def test_chunks_beside_decoding_sequences(device, kind, sequences, window):
    check(Case(device, sequences, SHAPE, window=window, dtype=torch.float16), kind)


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("shape", [(3, 1, 32), (2, 2, 24), (5, 1, 80)])
def test_page_sizes_and_head_counts(device, kind, page_size, shape):
    sequences = [(2, 50), (0, 1), (31, 17)]
    check(Case(device, sequences, shape, page_size=page_size, dtype=torch.float16), kind)


def test_more_chunks_than_one_graph_takes(device, kind):
    sequences = [(number % 7, 9 + number % 3) for number in range(70)]
    check(Case(device, sequences, SHAPE, dtype=torch.float16), kind)
    used = sorted(graph.q.dim[0] for graph in fake_cudnn.GRAPHS for _ in range(graph.num_runs))
    assert used == ([64, 64] if kind is CudnnPrompts else [])


def test_layers_with_and_without_a_window(device, kind):
    full, windowed = (Case(device, SEQUENCES["alone and together"], SHAPE, window=window, dtype=torch.float16)
                      for window in (None, 5))  # fmt: skip
    spec = dataclasses.replace(full.spec, windows=(None, 5))
    windowed_layer = windowed.layer
    full_layer = full.layer
    backend = make_backend(SimpleNamespace(spec=spec, pool=full.pool), kind(spec, limits_of(full)))
    backend.init_forward_metadata(full.batch)
    for layer in (full_layer, windowed_layer, full_layer):
        full.layer = layer
        layer.bind(backend)
        full.compare(layer(full.q, full.batch), full.native())


def test_long_chunks_go_alone_as_far_as_there_is_room_for_their_keys(device, monkeypatch, caplog):
    case = Case(device, SEQUENCES["alone and together"], SHAPE, dtype=torch.float16)
    token_bytes = 2 * 2 * 16 * 2
    for room, alone, said in ((1000, 2, []), (60, 1, ["60"]), (39, 0, ["0"])):
        caplog.clear()
        fake_cudnn.GRAPHS.clear()
        free = room * token_bytes * cudnn_prompts.COPY_SHARE
        monkeypatch.setattr(cudnn_prompts, "free_memory_nbytes", lambda device, free=free: free)
        with caplog.at_level(logging.INFO):
            check(case, CudnnPrompts)
        assert sum(graph.num_runs for graph in fake_cudnn.GRAPHS if graph.q.dim[0] == ALONE) == alone
        assert [record.getMessage().split(" tokens")[0].split()[-1] for record in caplog.records] == said


def test_passes_with_and_without_other_kernels_follow_each_other(device, kind):
    """A pass of few prompt tokens, or one from a graph, leaves what the last one planned alone."""
    mixed = Case(device, SEQUENCES["alone and together"], SHAPE, dtype=torch.float16)
    backend = make_backend(mixed, kind(mixed.spec, limits_of(mixed)))
    for sequences, is_used in ((SEQUENCES["alone and together"], True), ([(3, 1), (9, 1)], False), ([(0, 12)], True)):
        Case(device, sequences, SHAPE, dtype=torch.float16, pool=mixed.pool).check_made(backend)
        assert (backend._prompts is not None) == is_used


def test_a_replayed_pass_has_ramets_kernels_whatever_was_launched_before(device):
    case = Case(device, [(12, 1), (0, 17), (3, 2)], (2, 1, 16), dtype=torch.float16)
    case.fill(slice(case.page_size), 0.5)  # padding reads page 0, which holds numbers in an engine
    expected = case.native()
    backend = make_backend(case, FlashPrompts(case.spec, limits_of(case)))
    case.compare(case.run(backend), expected)
    num_rows, width = case.batch.req_to_page.shape
    pool = ReqToPagePool(num_rows, width, device)
    pool.req_to_page[:num_rows] = case.batch.req_to_page
    shape = CapturedShape(24, True)
    backend.init_cuda_graph_state([shape], pool.req_to_page)
    tokens = case.batch.tokens.padded(shape.num_tokens, pool.padding_row)
    inputs = torch.from_numpy(token_inputs(tokens)).to(device)
    backend.init_forward_metadata_replay_cuda_graph(shape, tokens, inputs[0])
    batch = make_captured_batch(pool, case.page_size, inputs, ForwardMode.EXTEND)
    backend.init_forward_metadata(batch)
    q = torch.zeros((shape.num_tokens, *case.q.shape[1:]), dtype=case.q.dtype, device=device)
    q[: len(expected)] = case.q
    case.compare(case.layer(q, batch)[: len(expected)], expected)
    assert backend._prompts is None
    case.compare(case.run(backend), expected)
    assert backend._prompts is not None


def test_a_choice_that_is_not_made_yet_changes_nothing(device):
    case = Case(device, SEQUENCES["one"], SHAPE, dtype=torch.float16)
    backend = make_backend(case, None)
    case.check_made(backend)
    assert backend._prompts is None


# Of hopper/flash_attn_interface.py, FlashAttention 2.8.
FLASH_PARAMETERS = """
    q k_cache v_cache k v qv rotary_cos rotary_sin cache_seqlens cache_batch_idx cache_leftpad page_table cu_seqlens_q
    cu_seqlens_k_new max_seqlen_q rotary_seqlens q_descale k_descale v_descale softmax_scale causal window_size
    attention_chunk softcap rotary_interleaved scheduler_metadata num_splits pack_gqa sm_margin return_softmax_lse
"""


def test_our_calls_fit_flash_attention(device):
    check(Case(device, SEQUENCES["one"], SHAPE, dtype=torch.float16), FlashPrompts)
    assert set(fake_flash_attention.CALLS[0]) <= set(FLASH_PARAMETERS.split())


def test_our_graphs_fit_the_real_cudnn_frontend(device, monkeypatch):
    """It checks the operation without a GPU; what it is lowered to needs cuDNN itself."""
    monkeypatch.delitem(sys.modules, "cudnn")
    try:
        real = importlib.import_module("cudnn")
        real.pygraph(handle=None)
    except (ImportError, OSError, RuntimeError) as error:  # some versions need cuDNN itself for a graph
        pytest.skip(f"the package nvidia-cudnn-frontend can't be used: {error}")
    graphs = []
    monkeypatch.setattr(real, "create_handle", lambda: None)
    for step in ("build_operation_graph", "create_execution_plans", "check_support", "build_plans"):
        monkeypatch.setattr(real.pygraph, step, lambda graph, *args: graphs.append(graph))
    monkeypatch.setattr(real.pygraph, "get_workspace_size", lambda graph: 1)
    case = Case(device, SEQUENCES["alone and together"], SHAPE, window=9, dtype=torch.float16)
    CudnnPrompts(dataclasses.replace(case.spec, windows=(None, 9)), limits_of(case))
    assert len(set(map(id, graphs))) == 6
    assert "handle" in inspect.signature(real.pygraph.execute).parameters
    assert {"handle", "stream"} <= set(inspect.signature(real.set_stream).parameters)
