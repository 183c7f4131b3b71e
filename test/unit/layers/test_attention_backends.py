"""The FlashInfer and torch_varlen backends: what they ask of the libraries, with stand-ins that compute it on a CPU."""

import dataclasses
import inspect
import sys

import fake_flashinfer
import fake_varlen
import numpy as np
import pytest
import random_models as rm
import torch
from attention_case import Case
from engine_harness import EngineHarness
from ramet.srt.batch.forward_batch_info import ForwardMode
from ramet.srt.batch.pass_tokens import PassTokens
from ramet.srt.layers.attention.base_attn_backend import CapturedShape
from ramet.srt.layers.attention.flashinfer_backend import FlashInferAttnBackend
from ramet.srt.layers.attention.requirements import missing_package
from ramet.srt.layers.attention.torch_varlen_backend import TorchVarlenAttnBackend
from ramet.srt.mem_cache.memory_pool import ReqToPagePool
from ramet.srt.model_executor.pass_batch import make_captured_batch, token_inputs
from torch.nn.attention import varlen

BACKENDS = {"flashinfer": FlashInferAttnBackend, "torch_varlen": TorchVarlenAttnBackend}
CPU = torch.device("cpu")
GROUPED, ALONE = (4, 2, 16), (2, 2, 24)  # heads, kv heads, head_dim
EXTEND = {
    "whole prompts": [(0, 5), (0, 16), (0, 1)],
    "behind prefixes": [(16, 7), (3, 12)],
    "the last chunk of a prompt": [(21, 2)],
    "mixed with single tokens": [(40, 1), (0, 9), (15, 1), (8, 33)],
}
DECODE = {"one": [(6, 1)], "page boundaries": [(3, 1), (4, 1), (0, 1), (7, 1)], "unlike lengths": [(60, 1), (2, 1)]}


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    monkeypatch.setattr("ramet.srt.layers.attention.flashinfer_backend.WORKSPACE_NBYTES", 16)
    monkeypatch.setitem(sys.modules, "flashinfer", fake_flashinfer)
    monkeypatch.setattr(varlen, "varlen_attn_out", fake_varlen.varlen_attn_out, raising=False)
    fake_flashinfer.CALLS.clear()
    fake_varlen.CALLS.clear()


@pytest.fixture(params=BACKENDS)
def backend_class(request):
    return BACKENDS[request.param]


@pytest.mark.parametrize("window", [None, 1, 9])
@pytest.mark.parametrize("sequences", EXTEND.values(), ids=EXTEND)
def test_prefill(backend_class, sequences, window):
    case = Case(CPU, sequences, GROUPED, window=window)
    case.check(backend_class)


@pytest.mark.parametrize("kv_scales", [None, (0.4, 3.0)])
def test_flashinfer_reads_a_cache_in_fp8(kv_scales):
    options = {"kv_dtype": torch.float8_e4m3fn, "kv_scales": kv_scales}
    Case(CPU, EXTEND["mixed with single tokens"], GROUPED, **options).check(FlashInferAttnBackend)
    Case(CPU, DECODE["unlike lengths"], GROUPED, decode=True, **options).check(FlashInferAttnBackend)


@pytest.mark.parametrize("window", [None, 1, 9])
@pytest.mark.parametrize("sequences", DECODE.values(), ids=DECODE)
def test_decode(backend_class, sequences, window):
    case = Case(CPU, sequences, GROUPED, window=window, decode=True)
    case.check(backend_class)


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("shape", [GROUPED, ALONE])
def test_page_sizes_and_head_counts(backend_class, page_size, shape):
    for sequences, decode in ((EXTEND["mixed with single tokens"], False), (DECODE["unlike lengths"], True)):
        case = Case(CPU, sequences, shape, page_size=page_size, decode=decode, dtype=torch.float16)
        case.check(backend_class)


def test_a_pass_leaves_nothing_to_the_next(backend_class):
    """Prefill, decode and prefill again with one backend."""
    first = Case(CPU, EXTEND["behind prefixes"], GROUPED)
    backend = backend_class(first.spec, first.pool)
    for sequences, decode in ((EXTEND["behind prefixes"], False), (DECODE["one"], True), ([(0, 3)], False)):
        Case(CPU, sequences, GROUPED, decode=decode, pool=first.pool).check_made(backend)


def test_layers_with_and_without_a_window(backend_class):
    full = Case(CPU, EXTEND["behind prefixes"], GROUPED)
    windowed = Case(CPU, EXTEND["behind prefixes"], GROUPED, window=5)
    backend = backend_class(dataclasses.replace(full.spec, windows=(None, 5)), full.pool)
    backend.init_forward_metadata(full.batch)
    for layer in (full.layer, windowed.layer, full.layer):
        full.layer = layer
        layer.bind(backend)
        full.compare(layer(full.q, full.batch), full.native())


class Replayed:
    """A decode pass as the CUDA graph runner has it: made once from fixed tensors, of which only the values change.

    A graph can't see the host, so the pass says there what it says when it is captured: that every sequence is as
    long as the table is wide.
    """

    def __init__(self, case, backend, sizes):
        self.case, self.backend = case, backend
        num_rows, width = case.batch.req_to_page.shape
        self.pool = ReqToPagePool(num_rows, width, case.device)
        self.pool.req_to_page[:num_rows] = case.batch.req_to_page
        self.inputs = torch.zeros(3 * max(sizes), dtype=torch.int64)
        backend.init_cuda_graph_state([CapturedShape(size, False) for size in sizes], self.pool.req_to_page)

    def run(self, rows, size):
        starts = self.case.batch.tokens.starts[rows]
        tokens = PassTokens(np.array(rows), starts, np.ones_like(starts), np.zeros_like(starts))
        tokens = tokens.padded(size, self.pool.padding_row)
        fixed = self.inputs[: 3 * size].view(3, size)
        fixed.copy_(torch.from_numpy(token_inputs(tokens)))
        self.backend.init_forward_metadata_replay_cuda_graph(CapturedShape(size, False), tokens, fixed[0])
        batch = make_captured_batch(self.pool, self.case.page_size, fixed, ForwardMode.DECODE)
        q = self.case.q[[row if row < len(self.case.q) else 0 for row in tokens.rows.tolist()]]
        self.backend.init_forward_metadata(batch)
        self.case.layer.bind(self.backend)
        return self.case.layer(q, batch)[: len(rows)]


@pytest.mark.parametrize("window", [None, 9])
def test_replays_of_a_captured_pass(backend_class, window):
    case = Case(CPU, [(60, 1), (2, 1), (15, 1), (31, 1), (16, 1)], GROUPED, window=window, decode=True)
    case.fill(slice(case.page_size), 0.5)  # padding reads page 0, which holds numbers in an engine
    expected = case.native()
    replayed = Replayed(case, backend_class(case.spec, case.pool), sizes=[1, 2, 4, 8])
    for rows, size in (([0, 1, 2, 3, 4], 8), ([3], 1), ([4, 2, 0], 4), ([1, 0], 2), ([2], 1), ([0, 1, 2, 3], 4)):
        case.compare(replayed.run(rows, size), expected[rows])


def test_captured_wrappers_share_their_buffers():
    """A plan is copied there before each replay: a buffer for each size would only cost memory."""
    case = Case(CPU, DECODE["unlike lengths"], GROUPED, decode=True)
    Replayed(case, FlashInferAttnBackend(case.spec, case.pool), sizes=[1, 2, 4])
    made = [
        kwargs for _, method, _, kwargs in fake_flashinfer.CALLS if method == "__init__" and "use_cuda_graph" in kwargs
    ]
    assert [len(kwargs["paged_kv_last_page_len_buffer"]) for kwargs in made] == [1, 2, 4]
    for name in ("paged_kv_indptr_buffer", "paged_kv_indices_buffer", "paged_kv_last_page_len_buffer"):
        assert len({kwargs[name].data_ptr() for kwargs in made}) == 1


@pytest.mark.parametrize(("num_heads", "wanted"), [(2, False), (4, False), (6, True), (16, True)])
def test_tensor_cores_for_large_groups(num_heads, wanted):
    case = Case(CPU, DECODE["one"], (num_heads, 2, 16), decode=True)
    case.check(FlashInferAttnBackend)
    made = [kwargs for name, method, _, kwargs in fake_flashinfer.CALLS if (name[5], method) == ("D", "__init__")]
    assert [kwargs["use_tensor_cores"] for kwargs in made] == [wanted]


@pytest.mark.parametrize("family", ["llama3", "mistral"])  # mistral has a sliding window
@pytest.mark.parametrize("name", BACKENDS)
def test_an_engine_gives_the_same_tokens(monkeypatch, tmp_path, name, family):
    """Chunked prompts beside decoding requests, a warm prefix cache, and retraction for want of pages."""
    folder = rm.make_model(tmp_path, family)
    prompts = rm.random_prompts([1, 5, 17, 33, 60])
    settings = {"chunked_prefill_size": 7, "max_total_tokens": 160}
    expected = EngineHarness(folder, **settings).generate(prompts, max_new_tokens=14)
    monkeypatch.setattr(BACKENDS[name], "obstacle", staticmethod(lambda spec: None))
    engine = EngineHarness(folder, attention_backend=name, **settings)
    assert isinstance(engine.runner.attn_backend, BACKENDS[name])
    for _ in range(2):
        results = engine.generate(prompts, max_new_tokens=14)
        assert [result.token_ids for result in results] == [result.token_ids for result in expected]
    assert engine.scheduler.running.num_retracted > 0 and results[-1].cached_tokens > 0


def record_calls(backend_class):
    for sequences, decode in ((EXTEND["mixed with single tokens"], False), (DECODE["unlike lengths"], True)):
        case = Case(CPU, sequences, GROUPED, page_size=16, window=9, decode=decode, dtype=torch.float16)
        case.check(backend_class)
    case.fill(slice(case.page_size), 0.5)
    Replayed(case, backend_class(case.spec, case.pool), sizes=[2]).run([1], 2)


@dataclasses.dataclass
class Names:
    """The parameters of a method behind `self`: first those that every call must give, then others, in order."""

    required: str
    optional: str = ""
    keyword_only: str = ""  # optional too

    def signature(self):
        kinds = inspect.Parameter
        names = [("self", kinds.POSITIONAL_OR_KEYWORD, kinds.empty)]
        names += [(name, kinds.POSITIONAL_OR_KEYWORD, kinds.empty) for name in self.required.split()]
        names += [(name, kinds.POSITIONAL_OR_KEYWORD, None) for name in self.optional.split()]
        names += [(name, kinds.KEYWORD_ONLY, None) for name in self.keyword_only.split()]
        return inspect.Signature([kinds(name, kind, default=default) for name, kind, default in names])


# Of flashinfer-python 0.6.6. Its `run` methods take further positional arguments for backends of one's own.
FLASHINFER = {
    ("BatchDecodeWithPagedKVCacheWrapper", "__init__"): Names(
        "float_workspace_buffer",
        "kv_layout use_cuda_graph use_tensor_cores paged_kv_indptr_buffer paged_kv_indices_buffer "
        "paged_kv_last_page_len_buffer backend jit_args",
    ),
    ("BatchDecodeWithPagedKVCacheWrapper", "plan"): Names(
        "indptr indices last_page_len num_qo_heads num_kv_heads head_dim page_size",
        "pos_encoding_mode window_left logits_soft_cap q_data_type kv_data_type o_data_type data_type sm_scale "
        "rope_scale rope_theta non_blocking block_tables seq_lens fixed_split_size disable_split_kv",
    ),
    ("BatchDecodeWithPagedKVCacheWrapper", "run"): Names(
        "q paged_kv_cache",
        keyword_only="q_scale k_scale v_scale out lse return_lse enable_pdl window_left sinks q_len_per_req "
        "skip_softmax_threshold_scale_factor",
    ),
    ("BatchPrefillWithPagedKVCacheWrapper", "__init__"): Names(
        "float_workspace_buffer",
        "kv_layout use_cuda_graph qo_indptr_buf paged_kv_indptr_buf paged_kv_indices_buf paged_kv_last_page_len_buf "
        "custom_mask_buf mask_indptr_buf backend jit_args jit_kwargs",
    ),
    ("BatchPrefillWithPagedKVCacheWrapper", "plan"): Names(
        "qo_indptr paged_kv_indptr paged_kv_indices paged_kv_last_page_len num_qo_heads num_kv_heads head_dim_qk "
        "page_size",
        "head_dim_vo custom_mask packed_custom_mask causal pos_encoding_mode use_fp16_qk_reduction sm_scale "
        "window_left logits_soft_cap rope_scale rope_theta q_data_type kv_data_type o_data_type non_blocking "
        "prefix_len_ptr token_pos_in_items_ptr token_pos_in_items_len max_item_len_ptr seq_lens seq_lens_q "
        "block_tables max_token_per_sequence max_sequence_kv fixed_split_size disable_split_kv",
    ),
    ("BatchPrefillWithPagedKVCacheWrapper", "run"): Names(
        "q paged_kv_cache",
        keyword_only="q_scale k_scale v_scale out lse return_lse enable_pdl window_left sinks "
        "skip_softmax_threshold_scale_factor",
    ),
}


def test_our_calls_fit_the_recorded_flashinfer():
    record_calls(FlashInferAttnBackend)
    assert {(name, method) for name, method, *_ in fake_flashinfer.CALLS} == set(FLASHINFER)
    for name, method, args, kwargs in fake_flashinfer.CALLS:
        FLASHINFER[name, method].signature().bind(None, *args, **kwargs)


def test_our_calls_fit_the_real_flashinfer(monkeypatch):
    record_calls(FlashInferAttnBackend)
    assert fake_flashinfer.CALLS
    monkeypatch.delitem(sys.modules, "flashinfer")
    real = pytest.importorskip("flashinfer", reason="the package flashinfer is not installed")
    for name, method, args, kwargs in fake_flashinfer.CALLS:
        function = getattr(getattr(real, name), method)
        parameters = inspect.signature(function).parameters.values()
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            function = getattr(getattr(real, name), f"_{method}_impl")  # some versions only pass the arguments on
        inspect.signature(function).bind(None, *args, **kwargs)


def test_our_calls_fit_the_real_varlen_attention(monkeypatch):
    """On meta tensors the real function checks the arguments and their types, and computes nothing."""
    record_calls(TorchVarlenAttnBackend)
    assert len(fake_varlen.CALLS) == 3
    monkeypatch.undo()
    if missing := missing_package("torch_varlen"):
        pytest.skip(f"needs {missing}")
    for args, kwargs in fake_varlen.CALLS:
        args = [arg.to("meta") if isinstance(arg, torch.Tensor) else arg for arg in args]
        kwargs = {name: arg.to("meta") if isinstance(arg, torch.Tensor) else arg for name, arg in kwargs.items()}
        assert varlen.varlen_attn_out(*args, **kwargs) is args[0]
