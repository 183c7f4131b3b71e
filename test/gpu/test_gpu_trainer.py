"""A trainer's tensors on GPUs: instances on the same host take them by CUDA IPC, whatever either side's layout."""

import sys
from pathlib import Path

import httpx
import published_weights as pw
import pytest
import random_models as rm
import sharded_models as sm
import torch
from ramet.srt.weights.errors import WeightTransferError
from ramet.trainer import WeightPublisher
from trainer_ranks import TrainerProcesses

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmark"))
from bench_common import running  # noqa: E402 - its folder is made importable above

TWO = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
INSTANCES = {"tp 1": {}, "tp 2": {"tp_size": 2}, "ep 2": {"tp_size": 2, "ep_size": 2}}
FAMILIES = ("llama3", "qwen3_moe")
EXPANDABLE = {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
SAMPLING = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: rm.make_model(root / name, name, dtype="bfloat16") for name in FAMILIES}


def take_all(folder: Path, trainer: TrainerProcesses, version: str) -> None:
    """Every rank of every instance, on as many GPUs as there are; each byte as that of a load from the files."""
    for name, sizes in INSTANCES.items():
        for number, parallel in enumerate(sm.ranks_of(**sizes)):
            device = f"cuda:{number % torch.cuda.device_count()}"
            for quantization in (None, "fp8") if name != "ep 2" else (None,):
                stage, report = pw.take_from(folder, trainer.addresses, parallel, quantization, version, device=device)
                assert report.verified and report.source == "local_copy", (name, report)
                pw.assert_as_from_files(folder, stage, quantization)


@pytest.mark.parametrize("environment", [{}, EXPANDABLE], ids=["segments", "expandable segments"])
def test_every_instance_takes_what_two_ranks_have(folders, environment):
    """Both on one GPU, if there is no second one."""
    with TrainerProcesses(2, folders["llama3"], layout="tp", device="cuda", environment=environment) as trainer:
        for number, family in enumerate(FAMILIES):
            trainer.publish(folders[family], f"step-{number}")
            take_all(folders[family], trainer, f"step-{number}")


@TWO
def test_shards_of_fsdp_over_two_gpus(folders):
    with TrainerProcesses(2, folders["llama3"], layout="fsdp", device="cuda") as trainer:
        for number, family in enumerate(FAMILIES):
            trainer.publish(folders[family], f"step-{number}")
            take_all(folders[family], trainer, f"step-{number}")


def test_a_trainer_that_is_killed_is_an_error_and_the_next_one_is_taken_from(folders):
    folder = folders["llama3"]
    parallel = sm.ranks_of()[0]
    with TrainerProcesses(2, folder, layout="tp", device="cuda") as trainer:
        trainer.publish(folder, "step-1")
        trainer.kill(1)
        with pytest.raises(WeightTransferError):
            pw.take_from(folder, trainer.addresses, parallel, device="cuda")
    with TrainerProcesses(2, folder, layout="tp", device="cuda") as trainer:
        trainer.publish(folder, "step-1")
        stage, _ = pw.take_from(folder, trainer.addresses, parallel, device="cuda")
        pw.assert_as_from_files(folder, stage)


@pytest.mark.parametrize("environment", [{}, EXPANDABLE], ids=["segments", "expandable segments"])
def test_one_copy_is_kept_however_often_it_is_published(tmp_path, environment):
    folder = rm.make_model(tmp_path / "large", "llama2", dtype="bfloat16", hidden_size=1024, intermediate_size=4096)
    with TrainerProcesses(1, folder, layout="tp", device="cuda", environment=environment) as trainer:
        (said,) = trainer.publish(folder, "step-1")
        before = torch.cuda.mem_get_info(0)[0]
        for number in range(2, 12):
            trainer.publish(folder, f"step-{number}")
        assert before - torch.cuda.mem_get_info(0)[0] < 2 * said["bytes"]
        stage, _ = pw.take_from(folder, trainer.addresses, sm.ranks_of()[0], version="step-11", device="cuda")
        pw.assert_as_from_files(folder, stage)


@TWO
def test_the_trainer_s_current_device_stays_what_it_was():
    torch.cuda.set_device(0)
    with WeightPublisher({"a": torch.ones(1000, 1000, device="cuda:1")}, "step-1") as publisher:
        assert publisher.version == "step-1" and torch.cuda.current_device() == 0


@pytest.mark.parametrize("flags", [[], pytest.param(["--tp-size", "2"], marks=TWO)], ids=["tp 1", "tp 2"])
def test_an_instance_answers_with_what_a_trainer_has_published(tmp_path, flags):
    old, new = (rm.make_model(tmp_path / str(seed), "llama3", seed=seed) for seed in (0, 1))
    prompts = rm.random_prompts([5, 33])
    common = ["--device", "cuda", "--max-total-tokens", "4096", "--max-running-requests", "8"]
    with (
        TrainerProcesses(2, old, layout="tp", device="cuda") as trainer,
        running(old, *common, *flags) as server,
    ):
        trainer.publish(new, "step-1")
        answer = httpx.post(f"http://127.0.0.1:{server.port}/update_weights_from_instance",
                            json={"address": trainer.address}, timeout=60)  # fmt: skip
        assert answer.status_code == 200 and answer.json()["weight_version"] == "step-1", answer.text
        answers = server.call("/generate", {"input_ids": prompts, "sampling_params": SAMPLING})
    assert [one["output_ids"] for one in answers] == rm.hf_greedy(new, prompts, 12)
