"""Owns the tests of what instances of any topology take from trainers of any layout: the bytes of a load from files."""

import time
from pathlib import Path

import published_weights as pw
import pytest
import random_models as rm
import sharded_models as sm
import torch
from ramet.srt.model_loader.checkpoint.describe_model import describe_whole_model
from ramet.srt.model_loader.client.published import plan_pull
from ramet.srt.weights.errors import WeightTransferError
from ramet.srt.weights.planner import ArenaSource, plan
from ramet.srt.weights.registration import parse_answer
from ramet.trainer import Slice, Sliced, WeightPublisher
from safetensors.torch import load_file

EIGHT_BILLION = {
    "hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128, "num_hidden_layers": 36, "vocab_size": 151936, "max_window_layers": 36, "dtype": "bfloat16",
}  # fmt: skip
INSTANCES = {
    "tp 1": {},
    "tp 2": {"tp_size": 2},
    "tp 4": {"tp_size": 4},
    "ep 2": {"tp_size": 2, "ep_size": 2},
    "pp 2": {"pp_size": 2},
}
LAYOUTS = {
    "plain": lambda weights: [weights],
    "fused": lambda weights: [pw.fused(weights)],
    "tp 2": lambda weights: [pw.halves(weights, rank) for rank in range(2)],
    "tp 2 x pp 2": lambda weights: [pw.quarters(weights, rank) for rank in range(4)],
    "tp 3 twice": lambda weights: [pw.halves(weights, rank % 3, 3) for rank in range(6)],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: rm.make_model(root / name, name, dtype="bfloat16") for name in ("llama3", "qwen2", "qwen3_moe")}


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["llama3", "qwen3_moe"])
def test_every_topology_takes_every_layout(folders, family, layout):
    folder = folders[family]
    with pw.published(*LAYOUTS[layout](weights_of(folder))) as publishers:
        for sizes in INSTANCES.values():
            for parallel in sm.ranks_of(**sizes):
                stage, report = pw.take(folder, publishers, parallel)
                assert report.verified and report.source == "local_copy" and report.weight_version == "step-1"
                pw.assert_as_from_files(folder, stage)


@pytest.mark.parametrize(
    ("family", "layout"), [("llama3", "tp 2 x pp 2"), ("qwen3_moe", "plain"), ("qwen3_moe", "tp 3 twice")]
)
def test_an_instance_quantises_while_it_takes(folders, family, layout, monkeypatch):
    monkeypatch.setattr("ramet.srt.model_loader.client.published.LANDING_BYTES", 100_000)  # several at a time, not all
    folder = folders[family]
    with pw.published(*LAYOUTS[layout](weights_of(folder))) as publishers:
        for sizes in ({}, {"tp_size": 2, "ep_size": 2}):
            for parallel in sm.ranks_of(**sizes):
                stage, report = pw.take(folder, publishers, parallel, "fp8")
                assert report.verified
                pw.assert_as_from_files(folder, stage, "fp8")


def test_masters_of_32_bits_are_cast_here_or_there(folders, tmp_path):
    folder = folders["qwen2"]
    weights = {name: tensor.float() + 1e-4 for name, tensor in weights_of(folder).items()}
    rounded = {name: tensor.bfloat16() for name, tensor in weights.items()}
    expected = rm.make_model(tmp_path / "rounded", "qwen2", dtype="bfloat16")
    sm_save(rounded, expected)
    parallel = sm.ranks_of(tp_size=2)[1]
    with pw.published(weights) as publishers:
        stage, report = pw.take(folder, publishers, parallel)
        pw.assert_as_from_files(expected, stage)
    with pw.published(weights, dtype=torch.bfloat16) as publishers:
        stage, half = pw.take(folder, publishers, parallel)
        pw.assert_as_from_files(expected, stage)
    assert report.num_bytes == 2 * half.num_bytes


def sm_save(weights, folder):
    from safetensors.torch import save_file

    save_file(weights, folder / "model.safetensors")


def test_a_transformers_model_is_published_as_it_is(folders):
    """Its experts are stacked, and its head is the embedding's table."""
    from transformers import AutoModelForCausalLM

    for family in ("llama3", "qwen3_moe"):
        model = AutoModelForCausalLM.from_pretrained(folders[family], dtype=torch.bfloat16)
        with pw.published(model) as publishers:
            for parallel in (*sm.ranks_of(), *sm.ranks_of(tp_size=2, ep_size=2)):
                stage, _ = pw.take(folders[family], publishers, parallel)
                pw.assert_as_from_files(folders[family], stage)


def test_what_was_published_stays_while_training_goes_on(folders):
    folder = folders["qwen2"]
    weights = weights_of(folder)
    with pw.published(weights) as (publisher,):
        for tensor in weights.values():
            tensor.zero_()
        pw.assert_as_from_files(folder, pw.take(folder, [publisher], sm.ranks_of()[0])[0])
        assert publisher.publish("step-2").num_bytes == sum(tensor.nbytes for tensor in weights.values())
        with pytest.raises(ValueError, match="publishes step-2 now, not step-1"):
            pw.take(folder, [publisher], sm.ranks_of()[0])
        stage, _ = pw.take(folder, [publisher], sm.ranks_of()[0], version="step-2")
        assert not stage.byte_tensor().any()


def test_what_is_no_whole_is_refused_by_name(folders):
    folder = folders["qwen2"]
    weights = weights_of(folder)
    name = "model.layers.1.mlp.up_proj.weight"
    rank = sm.ranks_of()[0]
    lacking = {one: tensor for one, tensor in weights.items() if one != name}
    larger = weights | {name: torch.zeros(weights[name].shape[0] + 1, weights[name].shape[1], dtype=torch.bfloat16)}
    surplus = weights | {"model.layers.9.mlp.up_proj.weight": weights[name]}
    headed = weights | {"lm_head.weight": weights["model.embed_tokens.weight"] + 1}
    turned = weights | {name: weights[name].t()}
    for sent, words in (
        (lacking, f"lacks {name}"),
        (larger, "has the shape"),
        (turned, "has the shape"),
        (surplus, "layers.9.mlp.up_proj.weight"),
        (headed, "output head of its own"),
        (pw.halves(weights, 1), "no source has"),
    ):
        with pw.published(sent) as publishers, pytest.raises(ValueError, match=words):
            pw.take(folder, publishers, rank)


def test_a_trainer_that_lies_is_found_out(folders):
    """Its bytes are not those of its checksums: nothing is taken from it."""
    folder = folders["qwen2"]
    with pw.published(weights_of(folder)) as (publisher,):
        regions = publisher._seed.answer
        publisher._server._ask = lambda request: flip(regions(request))
        with pytest.raises(WeightTransferError, match="checksums of 1 tensors differ"):
            pw.take(folder, [publisher], sm.ranks_of()[0])


def flip(reply):
    reply.checksums[3] = "0" * 16
    return reply


def test_ranks_that_hold_the_same_share_the_work(folders):
    folder = folders["llama3"]
    weights = weights_of(folder)
    with pw.published(weights, weights) as publishers:
        _, report = pw.take(folder, publishers, sm.ranks_of()[0])
    assert len(report.taken_bytes) in (1, 2) and sum(report.taken_bytes) == report.num_bytes


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({}, "no tensor"),
        ({"a": 3}, "a is a int"),
        ({"a": Sliced(torch.zeros(2, 2), Slice("w", (2, 2), ((0, 2), (0, 3))))}, "no part of w"),
        ({"a": Sliced(torch.zeros(2, 2), Slice("w", (4, 4), ((0, 3), (0, 2))))}, "does not fit"),
        ({"a": torch.zeros(2, device="meta")}, "meta"),
    ],
)
def test_what_can_not_be_published_is_refused(weights, words):
    with pytest.raises(ValueError, match=words):
        WeightPublisher(weights, "step-1")


def test_a_trainer_that_has_restarted_is_planned_anew_at_once(tmp_path):
    """The shape of an 8 B model, trainer and instance of two tensor-parallel ranks; without the tensors themselves."""
    folder = rm.make_config(tmp_path / "model", "qwen3", **EIGHT_BILLION)
    model = sm.build_model(folder, sm.ranks_of(tp_size=2)[0])
    manifest = sm.make_manifest(model)
    whole = describe_whole_model(model.config, manifest)
    bodies = [pw.answer_of(whole.shapes, rank) for rank in range(2)]

    def seconds() -> float:
        begun = time.thread_time()
        answers = [parse_answer(body) for body in bodies]
        pull = plan_pull(manifest, answers, whole)
        sources = [ArenaSource(str(rank), answer.manifest) for rank, answer in enumerate(answers)]
        assert plan(pull.direct, sources).nbytes == manifest.payload_nbytes
        return time.thread_time() - begun

    assert min(seconds() for _ in range(5)) < 0.1  # a third of it on a core that nobody else wants


def test_bad_arguments_are_refused():
    module = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="model_name"):
        WeightPublisher(module, metadata="127.0.0.1:1")
    with pytest.raises(ValueError, match="network"):
        WeightPublisher(module, network="fast")
    with WeightPublisher(module, "a") as publisher:
        with pytest.raises(ValueError, match="version"):
            publisher.publish("")
        assert publisher.version == "a"
