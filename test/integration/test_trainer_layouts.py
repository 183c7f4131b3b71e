"""Trainers of four processes, sharded as trainers are, and what instances of several layouts take of them at once."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import published_weights as pw
import random_models as rm
import sharded_models as sm
from safetensors.torch import load_file
from trainer_ranks import TrainerProcesses

INSTANCES = {
    "tp 1": {},
    "tp 2": {"tp_size": 2},
    "tp 4": {"tp_size": 4},
    "ep 2": {"tp_size": 2, "ep_size": 2},
    "fp8": {"tp_size": 2},
}
CASES = [("llama3", "fsdp"), ("qwen3_moe", "tp fsdp")]
if os.environ.get("RAMET_LAYOUTS"):
    CASES += [("qwen3_moe", "fsdp"), ("llama3", "tp fsdp"), ("llama3", "tp")]


def take_at_once(folder: Path, addresses: list[str], version: str) -> None:
    """All ranks of all instances at the same time; each byte of each is compared with a load from the files."""
    asked = [
        (parallel, "fp8" if name == "fp8" else None)
        for name, sizes in INSTANCES.items()
        for parallel in sm.ranks_of(**sizes)
    ]
    with ThreadPoolExecutor(len(asked)) as pool:
        taken = list(pool.map(lambda one: pw.take_from(folder, addresses, *one, version=version), asked))
    for (_, quantization), (stage, report) in zip(asked, taken, strict=True):
        assert report.verified and report.weight_version == version and report.source == "local_copy"
        pw.assert_as_from_files(folder, stage, quantization)


def test_four_processes_to_every_layout_at_once(tmp_path: Path) -> None:
    folders = {name: rm.make_model(tmp_path / name, name, dtype="bfloat16") for name in ("llama3", "qwen3_moe")}
    with TrainerProcesses(4, folders["llama3"]) as trainer:
        for version, (family, layout) in enumerate(CASES):
            folder = folders[family]
            said = trainer.publish(folder, f"step-{version}", layout)
            whole = sum(one.nbytes for one in load_file(folder / "model.safetensors").values())
            held = sum(one["bytes"] for one in said)
            assert whole <= held < 1.1 * whole  # vectors are on all ranks of a tensor-parallel group
            take_at_once(folder, trainer.addresses, f"step-{version}")
