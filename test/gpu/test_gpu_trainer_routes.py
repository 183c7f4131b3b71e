"""Weights of a trainer's process on a GPU by the routes that verl and TRL use: CUDA IPC handles, and NCCL groups."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from trainers import Trainer, describe
from updated_servers import Case, post, tokens

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmark"))
from bench_common import Server, running  # noqa: E402 - its folder is made importable above

DEVICE = "cuda"
TWO = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
LAYOUTS = pytest.mark.parametrize("tp_size", [1, pytest.param(2, marks=TWO)])
NUM_BUCKETS = 3
GROUP = "weight_update_group"


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("models"))


@contextlib.contextmanager
def serving(case: Case, tp_size: int = 1) -> Iterator[Server]:
    """An instance with the old weights."""
    flags = ["--device", DEVICE, "--tp-size", str(tp_size), "--enable-memory-saver"]
    with running(case.models["old"], *flags, "--max-total-tokens", "4096", "--max-running-requests", "8") as server:
        yield server


@contextlib.contextmanager
def lent(case: Case, name: str, tp_size: int) -> Iterator[list[list[str]]]:
    """What a process that keeps a checkpoint on GPUs has pickled: buckets, of each a payload for every rank."""
    devices = ",".join(f"{DEVICE}:{rank}" if DEVICE == "cuda" else DEVICE for rank in range(tp_size))
    file = case.models[name] / "model.safetensors"
    command = [sys.executable, ROOT / "test" / "pickled_tensors.py", file, devices, str(NUM_BUCKETS)]
    trainer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert trainer.stdout is not None
        lines = [trainer.stdout.readline().strip() for _ in range(2 * NUM_BUCKETS)]
        yield [lines[start : start + tp_size] for start in range(0, len(lines), 2)]
    finally:
        trainer.kill()
        trainer.wait()


def send(server: Server, payloads: list[str], **body: object) -> dict:
    answer = post(server, "/update_weights_from_tensor", serialized_named_tensors=payloads, **body)
    assert answer.status_code == 200 and answer.json()["success"], answer.text
    return answer.json()


def call(server: Server, path: str, **body: object) -> None:
    answer = post(server, path, **body)
    assert answer.status_code == 200, answer.text


@LAYOUTS
def test_handles_come_in_buckets_asleep_and_in_a_session(case: Case, tp_size: int) -> None:
    """As verl's loop sends them; nothing of them serves before all have come."""
    with serving(case, tp_size) as server:
        assert tokens(server) == case.tokens["old"]
        with lent(case, "new", tp_size) as buckets:
            call(server, "/release_memory_occupation", tags=["kv_cache", "weights"])
            call(server, "/resume_memory_occupation", tags=["weights"])
            for payloads in buckets[:-1]:
                assert "must come before they do" in send(server, payloads, flush_cache=False)["message"]
                assert post(server, "/resume_memory_occupation", tags=["kv_cache"]).status_code == 400
            answer = send(server, buckets[-1], flush_cache=False, weight_version="step-1")
            assert answer["weight_version"] == "step-1" and answer["num_bytes"] > 0
            call(server, "/resume_memory_occupation", tags=["kv_cache"])
            assert tokens(server) == case.tokens["new"]
        with lent(case, "old", tp_size) as buckets:
            call(server, "/begin_weight_update")
            for payloads in buckets:
                send(server, payloads)
                assert tokens(server) == case.tokens["new"]
            call(server, "/end_weight_update", weight_version="step-2")
        assert tokens(server) == case.tokens["old"]  # also when the trainer has gone


def announced(case: Case, name: str) -> tuple[Path, dict]:
    path = case.models[name] / "model.safetensors"
    names, dtypes, shapes = describe(path)
    return path, {"names": names, "dtypes": dtypes, "shapes": shapes}


def take_broadcasts(case: Case, server: Server, trainer: Trainer, backend: str) -> None:
    """Tensors one by one, and all in one; then from a trainer that has started again."""
    for _ in range(2):
        place = {"master_address": "127.0.0.1", "master_port": trainer.port, "rank_offset": 1, "world_size": 2}
        call(server, "/init_weights_update_group", **place, group_name=GROUP, backend=backend)
        assert trainer.wait() == "done"
        for name, flat in (("new", None), ("old", 1 << 40)):
            path, said = announced(case, name)
            trainer.send(path, flat=flat)
            load_format = "flattened_bucket" if flat else None
            call(server, "/update_weights_from_distributed", **said, group_name=GROUP, load_format=load_format)
            assert trainer.wait() == "done" and tokens(server) == case.tokens[name]
        trainer.join(2, GROUP, gpu=1 if backend == "nccl" else None)


@TWO
def test_broadcasts_by_nccl(case: Case) -> None:
    """The trainer's GPU is another one than the instance's, as NCCL wants it."""
    with serving(case) as server, Trainer() as trainer:
        trainer.join(2, GROUP, gpu=1)
        take_broadcasts(case, server, trainer, "nccl")


def test_broadcasts_by_gloo_to_a_gpu(case: Case) -> None:
    """For a trainer on the same GPU, or on none."""
    with serving(case) as server, Trainer() as trainer:
        trainer.join(2, GROUP)
        take_broadcasts(case, server, trainer, "gloo")


@TWO
def test_vllm_s_engine_by_nccl(case: Case) -> None:
    """As TRL's trainer does it: with vLLM's communicator."""
    path, said = announced(case, "new")
    info = {"names": said["names"], "dtype_names": said["dtypes"], "shapes": said["shapes"]}
    with serving(case) as server, Trainer() as trainer:
        trainer.join(2, "", gpu=1)
        place = {"master_address": "127.0.0.1", "master_port": trainer.port, "rank_offset": 1, "world_size": 2}
        call(server, "/init_weight_transfer_engine", init_info=place)
        assert trainer.wait() == "done"
        call(server, "/start_weight_update", is_checkpoint_format=True)
        trainer.send(path)
        call(server, "/update_weights", update_info=info)
        assert trainer.wait() == "done" and tokens(server) == case.tokens["old"]
        call(server, "/finish_weight_update", weight_version="step-3")
        assert tokens(server) == case.tokens["new"]
