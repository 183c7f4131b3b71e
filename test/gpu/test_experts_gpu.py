"""Experts on GPUs: packed ones of few tokens, what `ramet tune` measures, and the exchange between two GPUs."""

import subprocess
import sys
from pathlib import Path

import expert_exchange
import packed_models as pm
import pytest
import random_models as rm
import torch
from fp8_models import on_device
from packed_models import make_weight
from ramet.cli import main
from ramet.srt.layers.activation import get_activation
from ramet.srt.layers.fused_experts import fused_experts
from ramet.srt.layers.kernels.choices import CHOICES, EXPERTS_BY, OTHER, OURS, row_class, trying
from ramet.srt.layers.tuned_file import load_measured

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmark"))
from bench_common import running  # noqa: E402 - its folder is made importable above

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
NEEDS_TWO = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
EXPERTS, HIDDEN, SIZE, TOP_K = 16, 256, 128, 4
KINDS = {"mxfp4": pm.mxfp4(), "int4": pm.ct_packed(has_zeros=True), "nvfp4": pm.nvfp4("compressed-tensors"),
         "gptq": pm.gptq()}  # fmt: skip
PROMPTS = rm.random_prompts([5, 33, 60])
TIMEOUT_S = 300


def matrix(generator, num_rows, num_columns):
    return torch.randn(num_rows, num_columns, generator=generator) / num_columns**0.5


@pytest.mark.parametrize("num_tokens", [1, 3, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_experts_one_by_one_give_what_grouped_ones_give(kind, num_tokens):
    """In a graph that follows the routing: spread, all tokens to the same experts, and some to other ranks'."""
    generator = torch.Generator().manual_seed(0)
    w13, w2 = (
        on_device(make_weight(KINDS[kind], [matrix(generator, *shape) for _ in range(EXPERTS)])[0], "cuda")
        for shape in ((2 * SIZE, HIDDEN), (HIDDEN, SIZE))
    )
    x = torch.randn(num_tokens, HIDDEN, generator=generator).cuda().bfloat16()
    weights = torch.rand(num_tokens, TOP_K, generator=generator).cuda()
    ids = torch.randint(0, EXPERTS, (num_tokens, TOP_K), generator=generator, dtype=torch.int32).cuda()
    keys = [(row_class(ids.numel()), *weight.shape, 4) for weight in (w13, w2)]

    def run(way):
        with trying(EXPERTS_BY, keys[0], way), trying(EXPERTS_BY, keys[1], way):
            return fused_experts(x, w13, w2, weights, ids, get_activation("silu"), first_expert=2)

    run(OURS)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(OURS)
    for new in (ids.clone(), torch.full_like(ids, 5), torch.full_like(ids, 1)):
        ids.copy_(new)
        graph.replay()
        expected = run(OTHER)
        assert (y - expected).float().norm() <= 1e-2 * expected.float().norm()


def test_all_that_a_small_model_asks_for_is_measured_and_taken(tmp_path, monkeypatch, capsys):
    """Every value that can be chosen runs here, or is passed over; what is kept is found again."""
    from ramet.srt.model_executor import layer_trials, tuner

    monkeypatch.setattr(layer_trials, "COLD_BYTES", 1 << 20)
    monkeypatch.setattr(tuner, "NUM_ROWS", (64, 16, 1))
    folder = rm.make_config(
        tmp_path / "model", "qwen3_moe", dtype="bfloat16", hidden_size=512, moe_intermediate_size=256
    )
    for flags in ([], ["--quantization", "fp8"]):
        assert main(["tune", str(folder), *flags, "--output", str(tmp_path / "out"), "--log-level", "warning"]) == 0
        said = capsys.readouterr().out
        assert int(said.split()[0]) > 5, said
    (path,) = (tmp_path / "out").iterdir()
    monkeypatch.setenv("RAMET_TUNING_DIR", str(tmp_path / "none"))
    measured = load_measured(str(path.parent), torch.device("cuda", 0))
    assert all(value in CHOICES[name].values for (name, _), value in measured.items())
    sampling = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}
    common = ["--device", "cuda", "--max-total-tokens", "1024", "--max-running-requests", "4", "--load-format", "dummy"]
    rm.write_tokenizer(folder)
    with running(folder, *common, "--tuning-dir", str(path.parent)) as server:
        answers = server.call("/generate", {"input_ids": PROMPTS, "sampling_params": sampling})
    assert [len(answer["output_ids"]) for answer in answers] == [4] * len(PROMPTS)


@NEEDS_TWO
def test_two_gpus_exchange_tokens_in_a_graph(tmp_path):
    """Balanced, and half of the tokens for one expert."""
    command = [sys.executable, expert_exchange.__file__]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path), "cuda"], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        errors = [rank.communicate(timeout=TIMEOUT_S)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [0, 0], errors


@NEEDS_TWO
@pytest.mark.parametrize(
    "flags",
    [
        ["--ep-size", "2"],
        ["--ep-size", "2", "--enable-dp-attention", "--dp-size", "2"],
        ["--enable-dp-attention", "--dp-size", "2", "--disable-cuda-graph"],
    ],
)
def test_greedy_tokens_of_experts_over_two_gpus_equal_transformers(tmp_path, flags):
    """All at once, so that both attention groups have requests in one pass, and then alone, so that one has none."""
    folder = rm.make_model(tmp_path, "qwen3_moe", num_hidden_layers=4)
    common = ["--device", "cuda", "--max-total-tokens", "4096", "--max-running-requests", "8", "--tp-size", "2"]
    sampling = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
    expected = rm.hf_greedy(folder, PROMPTS, 12)
    with running(folder, *common, *flags) as server:
        answers = server.call("/generate", {"input_ids": PROMPTS, "sampling_params": sampling})
        alone = server.call("/generate", {"input_ids": PROMPTS[:1], "sampling_params": sampling})
    assert [answer["output_ids"] for answer in answers] == expected
    assert alone[0]["output_ids"] == expected[0]
