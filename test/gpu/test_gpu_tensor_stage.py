"""Tensors that come to a GPU make there what a load makes: from the host, from the GPU, and from another process's."""

import base64
import dataclasses
import subprocess
import sys
from pathlib import Path

import fp8_models
import pytest
import random_models as rm
import sharded_models as sm
import torch
from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.model_executor.tensor_feeds import TensorFeeds
from ramet.srt.model_executor.weight_delta import stage_delta
from ramet.srt.model_loader.checkpoint.describe_model import describe_whole_model
from ramet.srt.model_loader.checkpoint.file_stamps import file_stamp
from ramet.srt.model_loader.checksums.entries import compute_checksums
from ramet.srt.model_loader.delta_writer import write_delta
from ramet.srt.model_loader.tensor_pickles import read_tensors
from ramet.srt.model_loader.tensor_stage import TensorStage
from ramet.srt.utils.net import host_identity
from ramet.srt.weights.update_messages import DeltaFile, PickledTensors
from safetensors.torch import load_file, save_file

NEW = "model.safetensors"


class Case:
    """A rank that serves one checkpoint, and what it would have of another one."""

    def __init__(self, folder: Path, quantization: str | None = None, parallel: ParallelConfig | None = None) -> None:
        self.old, self.new = (
            rm.make_model(folder / str(seed), "llama3", seed=seed, dtype="bfloat16") for seed in (0, 1)
        )
        model = sm.build_model(self.old, parallel or ParallelConfig(), quantization)
        self.serving = fp8_models.load_arena(self.old, model, "cuda")
        other = fp8_models.load_arena(self.new, model, "cuda")
        self.expected = compute_checksums(other.manifest, other).values
        self.whole = describe_whole_model(model.config, self.serving.manifest)

    def stage(self) -> TensorStage:
        return TensorStage(self.serving, self.serving.manifest, self.whole)


@pytest.mark.parametrize("quantization", [None, "fp8"])
@pytest.mark.parametrize("rank", [0, 1])
def test_tensors_of_host_and_gpu(tmp_path, quantization, rank):
    case = Case(tmp_path, quantization, sm.all_ranks(2)[rank])
    stage = case.stage()
    for number, (name, tensor) in enumerate(load_file(case.new / NEW).items()):
        stage.put(name, tensor.cuda() if number % 2 else tensor)
    stage.seal()
    assert stage.arena.checksums.values == case.expected


def test_what_another_process_lends(tmp_path):
    case = Case(tmp_path)
    script = Path(__file__).parents[1] / "pickled_tensors.py"
    trainer = subprocess.Popen(
        [sys.executable, script, case.new / NEW, "cuda"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        payload = base64.b64decode(trainer.stdout.readline())
        stage = case.stage()
        source = PickledTensors(payloads=[payload], load_format=None, host_identity=host_identity())
        for name, tensor in TensorFeeds(ParallelConfig()).open(source):
            assert tensor.is_cuda
            stage.put(name, tensor)
        stage.seal()
        assert stage.arena.checksums.values == case.expected
        (_, lent), *_ = read_tensors(payload, 0)
        with pytest.raises(ValueError, match="the sender's memory has"):
            dataclasses.replace(lent.memory, nbytes=1 << 45).open(False)
    finally:
        trainer.kill()
        trainer.wait()


@pytest.mark.parametrize("by", ["values", "xor"])
def test_a_delta(tmp_path, by):
    case = Case(tmp_path)
    before = load_file(case.old / NEW)
    after = {name: torch.where(torch.rand(one.shape) < 0.01, one + 0.25, one) for name, one in before.items()}
    save_file(after, case.new / NEW)
    path = str(tmp_path / "delta")
    write_delta(path, before, {name: tensor.cuda() for name, tensor in after.items()}, by=by)
    source = DeltaFile(path=path, digest=None, host_identity=host_identity(), stamp=file_stamp(path))
    stage, _ = stage_delta(source, case.serving, case.serving.manifest, case.whole)
    full = fp8_models.load_arena(case.new, sm.build_model(case.new, ParallelConfig()), "cuda")
    assert stage.checksums == compute_checksums(full.manifest, full)
