"""FlashMLA and FlashInfer for latent attention: what they are asked, by stand-ins that compute, and who is chosen."""

import dataclasses
import inspect
import logging
import sys
from types import SimpleNamespace

import fake_flash_mla
import fake_flashinfer
import numpy as np
import pytest
import random_models as rm
import torch
from attention_case import Case
from engine_harness import EngineHarness
from ramet.srt.batch.forward_batch_info import ForwardMode
from ramet.srt.batch.pass_tokens import PassTokens
from ramet.srt.configs.model_config import ModelConfig
from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.layers.attention import requirements
from ramet.srt.layers.attention.base_attn_backend import CapturedShape
from ramet.srt.layers.kernels.choices import LATENT_ROWS, trying
from ramet.srt.mem_cache.memory_pool import ReqToPagePool
from ramet.srt.model_executor.pass_batch import make_captured_batch, token_inputs
from ramet.srt.model_executor.tuner import Tuner
from ramet.srt.models.decoder import DecoderForCausalLM

LENGTHS = [(66, 1), (0, 1), (20, 1)]
CHUNKS = [(66, 1), (0, 3), (20, 2)]
# Of flash_mla in its first version and in that of 2026; of flashinfer-python 0.6.6.
FLASH_MLA = {
    "get_mla_metadata": ("cache_seqlens num_heads_per_head_k num_heads_k", "cache_seqlens num_q_tokens_per_head_k "
                         "num_heads_k num_heads_q is_fp8_kvcache topk"),
    "flash_mla_with_kvcache": (
        "q k_cache block_table cache_seqlens head_dim_v tile_scheduler_metadata num_splits softmax_scale causal",
        "q k_cache block_table cache_seqlens head_dim_v tile_scheduler_metadata num_splits softmax_scale causal "
        "is_fp8_kvcache indices attn_sink extra_k_cache extra_indices_in_kvcache topk_length extra_topk_length",
    ),
}  # fmt: skip
FLASHINFER = {
    "__init__": "self float_workspace_buffer use_cuda_graph qo_indptr kv_indptr kv_indices kv_len_arr backend",
    "plan": "self qo_indptr kv_indptr kv_indices kv_len_arr num_heads head_dim_ckv head_dim_kpe page_size causal "
            "sm_scale q_data_type kv_data_type use_profiler",
    "run": "self q_nope q_pe ckv_cache kpe_cache out lse return_lse profiler_buffer kv_len page_table "
           "return_lse_base_on_e",
}  # fmt: skip


@pytest.fixture(autouse=True)
def libraries(monkeypatch, device):
    monkeypatch.setitem(sys.modules, "flash_mla", fake_flash_mla)
    monkeypatch.setitem(sys.modules, "flashinfer.mla", fake_flashinfer)
    monkeypatch.setattr("ramet.srt.layers.attention.rows.flashinfer_rows.WORKSPACE_NBYTES", 16)
    fake_flash_mla.CALLS.clear()
    fake_flashinfer.CALLS.clear()


def make_case(device, sequences, **options):
    torch.manual_seed(0)
    options = {"rank": 512, "page_size": 64, "dtype": torch.float16, "decode": sequences is LENGTHS} | options
    return Case(device, sequences, (3, 1, 576), **options)


def backends():
    from ramet.srt.layers.attention import latent_library_backend as module

    return {"flash_mla": module.FlashMlaAttnBackend, "flashinfer": module.LatentFlashInferAttnBackend}


@pytest.mark.parametrize("sequences", [LENGTHS, CHUNKS], ids=["decode", "chunks"])
@pytest.mark.parametrize("name", ["flash_mla", "flashinfer"])
def test_a_launched_pass(device, name, sequences):
    """FlashMLA leaves passes with chunks to Ramet's kernels."""
    case = make_case(device, sequences)
    backend = backends()[name](case.spec, case.pool)
    case.check_made(backend)
    has_run = bool(fake_flash_mla.CALLS) if name == "flash_mla" else fake_flashinfer.CALLS[-1][1] == "run"
    assert has_run == (name == "flashinfer" or sequences is LENGTHS)


def replay(case, backend, rows, size):
    """What a captured pass gives for some of the case's sequences, with padding."""
    pool = ReqToPagePool(len(LENGTHS), case.batch.req_to_page.shape[1], case.device)
    pool.req_to_page[: len(LENGTHS)] = case.batch.req_to_page
    backend.init_cuda_graph_state([CapturedShape(size, False), CapturedShape(8, True)], pool.req_to_page)
    starts = case.batch.tokens.starts[rows]
    tokens = PassTokens(np.array(rows), starts, np.ones_like(starts), np.zeros_like(starts))
    tokens = tokens.padded(size, pool.padding_row)
    inputs = torch.from_numpy(token_inputs(tokens)).to(case.device)
    backend.init_forward_metadata_replay_cuda_graph(CapturedShape(size, False), tokens, inputs[0])
    batch = make_captured_batch(pool, case.page_size, inputs, ForwardMode.DECODE)
    backend.init_forward_metadata(batch)
    q = torch.zeros((size, *case.q.shape[1:]), dtype=case.q.dtype, device=case.device)
    q[: len(rows)] = case.q[rows]
    return backend.forward(q, case.layer.layer, batch)[: len(rows)]


@pytest.mark.parametrize("name", ["flash_mla", "flashinfer"])
def test_captured_passes(device, name):
    case = make_case(device, LENGTHS)
    case.fill(slice(case.page_size), 0.5)  # padding reads page 0
    expected = case.native()
    backend = backends()[name](case.spec, case.pool)
    for rows, size in (([0, 1, 2], 4), ([2, 0], 4), ([1], 1)):
        case.compare(replay(case, backend, rows, size), expected[rows])
    assert fake_flash_mla.CALLS if name == "flash_mla" else fake_flashinfer.CALLS


def test_a_captured_pass_with_chunks_is_for_our_kernels(device):
    case = make_case(device, CHUNKS)
    expected = case.native()
    backend = backends()["flashinfer"](case.spec, case.pool)
    pool = ReqToPagePool(3, case.batch.req_to_page.shape[1], device)
    pool.req_to_page[:3] = case.batch.req_to_page
    shape = CapturedShape(6, True)
    backend.init_cuda_graph_state([shape], pool.req_to_page)
    inputs = torch.from_numpy(token_inputs(case.batch.tokens)).to(device)
    backend.init_forward_metadata_replay_cuda_graph(shape, case.batch.tokens, inputs[0])
    batch = make_captured_batch(pool, case.page_size, inputs, ForwardMode.EXTEND)
    backend.init_forward_metadata(batch)
    fake_flashinfer.CALLS.clear()
    case.compare(backend.forward(case.q, case.layer.layer, batch), expected)
    assert not fake_flashinfer.CALLS


def binds(names, args, kwargs):
    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names.split()]
    inspect.Signature(parameters).bind_partial(*args, **kwargs)


def record(device):
    for backend in backends().values():
        case = make_case(device, LENGTHS)
        case.run(backend(case.spec, case.pool))
        replay(case, backend(case.spec, case.pool), [0], 1)


def test_our_calls_fit_what_is_recorded_of_both(device):
    record(device)
    assert {name for name, *_ in fake_flash_mla.CALLS} == set(FLASH_MLA)
    for name, args, kwargs in fake_flash_mla.CALLS:
        for names in FLASH_MLA[name]:
            binds(names, args, kwargs)
    assert {method for _, method, *_ in fake_flashinfer.CALLS} == set(FLASHINFER)
    for _, method, args, kwargs in fake_flashinfer.CALLS:
        binds(FLASHINFER[method], (None, *args), kwargs)


def test_our_calls_fit_what_is_installed(device, monkeypatch):
    record(device)
    monkeypatch.delitem(sys.modules, "flashinfer.mla")
    real = pytest.importorskip("flashinfer.mla", reason="the package flashinfer is not installed")
    for name, method, args, kwargs in fake_flashinfer.CALLS:
        inspect.signature(getattr(getattr(real, name), method)).bind(None, *args, **kwargs)


def with_gpu(spec, **changes):
    return dataclasses.replace(spec, device=torch.device("cuda"), **changes)


@pytest.mark.parametrize(
    ("name", "changes", "capability", "message"),
    [
        ("flash_mla", {"page_size": 16}, 9, "--page-size 64; it is 16"),
        ("flash_mla", {}, 10, "a GPU of compute capability 9"),
        ("flash_mla", {"dtype": torch.float16}, 9, "bfloat16; the model has float16"),
        ("flash_mla", {"kv": "rank 256"}, 9, "latent rows of 512 and 64 columns; the model's have 256 and 320"),
        ("flash_mla", {"kv": "none"}, 9, "a model with latent attention"),
        ("flashinfer", {"dtype": torch.float32}, 9, "bfloat16 or float16; the model has float32"),
        ("flashinfer", {"latent": SimpleNamespace(index=object())}, 9, "a model without a sparse index"),
    ],
)
def test_what_does_not_fit_is_said(device, monkeypatch, name, changes, capability, message):
    from ramet.srt.layers.attention.registry import choose_attn_backend

    monkeypatch.setattr(requirements.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (capability, 0))
    spec = dataclasses.replace(make_case(device, LENGTHS[:1]).spec, dtype=torch.bfloat16)
    if "kv" in changes:
        rank_256 = dataclasses.replace(spec.kv, value_dim=256)
        kinds = {"rank 256": rank_256, "none": dataclasses.replace(spec.kv, is_latent=False)}
        changes = {"kv": kinds[changes["kv"]]}
    with pytest.raises(ValueError, match=f"--attention-backend {name} needs {message}"):
        choose_attn_backend(name, with_gpu(spec, **changes))


def test_what_is_not_installed_is_said(monkeypatch):
    from ramet.srt.layers.attention.requirements import check_attention_backend

    monkeypatch.setattr(requirements.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match="--attention-backend flash_mla needs the package flash_mla, which is not inst"
    ):
        check_attention_backend("flash_mla")


@pytest.fixture
def fitting(monkeypatch, device):
    """Both libraries fit; a layer takes what the test says: of Ramet's kernels, and of each library."""
    from ramet.srt.layers.attention.rows import choice

    monkeypatch.setattr(choice, "TRIAL_LENGTHS", (70, 3))
    for candidate in choice.CANDIDATES:
        monkeypatch.setattr(candidate, "obstacle", staticmethod(lambda spec: None))
    seconds = {"own": 1.0, "flash_mla": 0.5, "flashinfer": 0.4}

    def time(run):
        run()
        is_own = getattr(run, "__name__", "") == "own"
        name = "own" if is_own else inspect.getclosurevars(run).nonlocals["library"].name
        return seconds[name]

    monkeypatch.setattr(choice, "_seconds", time)
    return seconds


def chosen(device, caplog, seconds=None, **options):
    from ramet.srt.layers.attention.latent_library_backend import LatentLibraryBackend

    caplog.set_level(logging.INFO)
    case = make_case(device, LENGTHS, **options)
    backend = LatentLibraryBackend(case.spec, case.pool)
    backend.choose_at_start()
    case.check_made(backend)
    return backend.library and backend.library.name


def test_at_start_what_needs_no_compiler_is_measured(device, caplog, fitting):
    assert chosen(device, caplog) == "flash_mla"
    assert "flash_mla takes 500.000 ms for 2 requests, Triton 1000.000" in caplog.text
    assert "is computed by flash_mla" in caplog.text and "whether flashinfer is faster, `ramet tune`" in caplog.text
    fitting["flash_mla"] = 0.99
    assert chosen(device, caplog) is None


@pytest.mark.parametrize(("value", "name"), [((2,), "flashinfer"), ((1,), "flash_mla"), ((0,), None)])
def test_what_was_measured_before_is_taken(device, caplog, fitting, value, name):
    with trying(LATENT_ROWS, (3, 64, 2, 3), value):
        assert chosen(device, caplog) == name


def test_who_gives_something_else_or_fails_is_not_taken(device, caplog, fitting, monkeypatch):
    monkeypatch.setattr(fake_flash_mla, "_attend", lambda q, *args, **kwargs: (torch.ones_like(q[..., :512]), None))
    assert chosen(device, caplog) is None
    assert "flash_mla is not used: its results differ from Triton's by" in caplog.text
    monkeypatch.delattr(fake_flash_mla, "get_mla_metadata")
    assert chosen(device, caplog) is None
    assert "has no attribute 'get_mla_metadata'" in caplog.text


def test_a_tuner_measures_both(device, fitting):
    from ramet.srt.layers.attention.rows.choice import CANDIDATES, OWN, Measured

    spec = make_case(device, LENGTHS).spec
    assert Measured(spec, CANDIDATES).value == (2,)
    fitting |= {"flashinfer": 2.0, "flash_mla": 2.0}
    measured = Measured(spec, CANDIDATES)
    assert measured.value == OWN and measured.own_s == 1.0


def test_tuning_a_model_keeps_the_fastest_for_each_page_size(device, fitting, monkeypatch, tmp_path):
    """FlashMLA doesn't run with pages of 16, and FlashInfer is too slow here to be kept."""
    from ramet.srt.layers.attention.latent_library_backend import LatentLibraryBackend
    from ramet.srt.model_executor import prompt_trial

    monkeypatch.setattr(prompt_trial, "choose_attn_backend", lambda name, spec: LatentLibraryBackend)
    fitting["flashinfer"] = 3.0
    sizes = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "num_attention_heads": 3, "num_key_value_heads": 3}
    config = ModelConfig.from_path(str(rm.make_config(tmp_path, "deepseek_v3", dtype="float16", **sizes)))
    tuner = Tuner(device)
    prompt_trial.tune_latent_rows(tuner, DecoderForCausalLM(config, torch.float16, ParallelConfig()), torch.float16)
    keys = [(3, page_size, 2, 3) for page_size in (16, 64)]
    assert tuner.tuned == [("latent_rows", key) for key in keys]
    assert [(tuple(entry.key.values()), entry.value) for entry in tuner.entries] == list(
        zip(keys, [(0,), (1,)], strict=True)
    )


def test_auto_measures_where_nothing_chooses_keys(device, monkeypatch):
    from ramet.srt.layers.attention.registry import choose_attn_backend

    monkeypatch.setattr(requirements.importlib.util, "find_spec", lambda name: name if name == "triton" else None)
    spec = with_gpu(make_case(device, LENGTHS[:1]).spec)
    assert choose_attn_backend("auto", spec).__name__ == "LatentLibraryBackend"
    assert choose_attn_backend("triton", spec).__name__ == "LatentTritonAttnBackend"
    indexed = dataclasses.replace(spec, latent=SimpleNamespace(index=object()))
    assert choose_attn_backend("auto", indexed).__name__ == "SparseTritonAttnBackend"


@pytest.mark.parametrize(("name", "page_size"), [("flash_mla", 64), ("flashinfer", 4)])
def test_an_engine_gives_the_same_tokens(device, monkeypatch, tmp_path, name, page_size):
    """Chunks of prompts beside requests that decode, and prefixes from the cache."""
    sizes = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    folder = rm.make_model(tmp_path, "deepseek_v3", num_key_value_heads=2, **sizes)
    prompts = rm.random_prompts([70, 3, 12])
    settings = {"chunked_prefill_size": 32, "page_size": page_size}
    expected = EngineHarness(folder, **settings).generate(prompts, max_new_tokens=3)
    monkeypatch.setattr(backends()[name], "obstacle", staticmethod(lambda spec: None))
    monkeypatch.setattr(requirements.importlib.util, "find_spec", lambda name: name)
    engine = EngineHarness(folder, attention_backend=name, **settings)
    for _ in range(2):
        results = engine.generate(prompts, max_new_tokens=3)
        assert [result.token_ids for result in results] == [result.token_ids for result in expected]
    assert results[0].cached_tokens == 69 // page_size * page_size
    assert any(
        "run" in call or "flash_mla_with_kvcache" in call for call in fake_flashinfer.CALLS + fake_flash_mla.CALLS
    )
