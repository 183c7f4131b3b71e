"""Weights of a replica of one rank that change: staged, verified, switched, back again; and whatever may go wrong."""

import gc
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import random_models as rm
import torch
from ramet.srt.managers.scheduler_loop import LOAD_POLL_S
from ramet.srt.model_executor import weight_update
from ramet.srt.model_executor.weight_update import StagedWeights
from ramet.srt.model_loader.checkpoint.file_stamps import file_stamps
from ramet.srt.model_loader.checkpoint.source import CheckpointSource
from ramet.srt.utils import host_memory
from ramet.srt.utils.net import host_identity
from ramet.srt.weights.update_messages import (
    DropWeightsReq,
    FilesSource,
    StageWeightsReq,
)
from safetensors.torch import load_file, save_file
from updated_engine import NUM_TOKENS, PROMPTS, Updated


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of one architecture, and one of another."""
    folder = tmp_path_factory.mktemp("models")
    made = {name: rm.make_model(folder / name, "llama3", seed=seed) for seed, name in enumerate(("old", "new"))}
    made["wide"] = rm.make_model(folder / "wide", "llama3", intermediate_size=96)
    return made


@pytest.fixture(scope="module")
def expected(models: dict[str, Path]) -> dict[str, list[list[int]]]:
    return {name: rm.hf_greedy(models[name], PROMPTS, NUM_TOKENS) for name in ("old", "new")}


@pytest.fixture(scope="module")
def shared(models: dict[str, Path]) -> Updated:
    return Updated(models["old"])


@pytest.fixture
def updated(shared: Updated) -> Iterator[Updated]:
    """One whose weights are the old ones, before and after."""
    before = shared.checksums()
    yield shared
    if shared.versions.current:
        shared.switch(weight_update.FIRST)
    for number in range(1, 5):
        shared.ask(DropWeightsReq(request_id=f"drop {number}", number=number))
    shared.versions._dropped.clear()
    assert shared.checksums() == before and not shared.versions._staged


def test_new_weights_serve_after_the_switch_and_old_ones_after_the_way_back(
    updated: Updated, models: dict[str, Path], expected: dict[str, Any]
) -> None:
    old = updated.checksums()
    assert updated.tokens() == expected["old"]
    reply = updated.stage(models["new"])
    assert reply.success and reply.source == "checkpoint" and reply.num_bytes > 0 and reply.seconds > 0
    assert updated.tokens() == expected["old"] and updated.checksums() == old
    reply = updated.switch()
    assert reply.success and 0 < reply.pause_s < 1 and updated.engine.scheduler.weight_version == "new"
    assert updated.tokens() == expected["new"]
    assert updated.checksums() == Updated(models["new"]).checksums()
    assert updated.switch(weight_update.FIRST, "default").success
    assert updated.tokens() == expected["old"] and updated.checksums() == old


def test_requests_go_on_while_weights_are_staged_and_through_the_switch(
    updated: Updated, models: dict[str, Path], expected: dict[str, Any]
) -> None:
    """A token is made by one version or the other; nothing that the old one has cached is found afterwards."""
    engine = updated.engine
    engine.channel.outputs.clear()
    engine.submit("long", PROMPTS[0], max_new_tokens=200)
    running = engine.scheduler.running
    while not running.decoding or len(running.decoding[0].req.output_ids) < NUM_TOKENS:
        engine.loop.run_once()
    updated.stage(models["new"])
    assert running.decoding
    before = len(running.decoding[0].req.output_ids)
    reply = updated.switch()
    assert reply.num_reqs == 1 and before < 199
    engine.submit("short", PROMPTS[0], max_new_tokens=NUM_TOKENS)
    results = engine.run()
    assert len(results["long"].token_ids) == 200
    assert results["long"].token_ids[:NUM_TOKENS] == expected["old"][0]
    assert results["short"].token_ids == expected["new"][0] and results["short"].cached_tokens == 0


def cut_off(folder: Path) -> str:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)
    return "is truncated|does not fit|bytes"


def drop_tensor(folder: Path) -> str:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path)
    return "lacks model.layers.1.mlp.up_proj.weight"


def add_tensor(folder: Path) -> str:
    path = folder / "model.safetensors"
    save_file(load_file(path) | {"model.layers.0.extra.weight": torch.zeros(3)}, path)
    return "has tensors that the model does not have: model.layers.0.extra.weight"


def change_type(folder: Path) -> str:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int32)
    save_file(tensors, path)
    return "model.norm.weight is int32"


def remove(folder: Path) -> str:
    (folder / "model.safetensors").unlink()
    return "safetensors"


@pytest.mark.parametrize("damage", [cut_off, drop_tensor, add_tensor, change_type, remove])
def test_files_that_do_not_fit_are_refused_before_they_take_memory(
    updated: Updated, models: dict[str, Path], expected: dict[str, Any], tmp_path: Path, damage: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = Path(shutil.copytree(models["new"], tmp_path / "model"))
    stamps = file_stamps(str(folder))
    words = damage(folder)
    monkeypatch.setattr(updated.versions.arena, "open_stage", None)
    if damage is not remove:
        stamps = file_stamps(str(folder))
    reply = updated.stage(folder, files=stamps)
    assert not reply.success and any(word in reply.message for word in words.split("|")), reply.message
    assert updated.tokens() == expected["old"]


def test_another_architecture_is_refused(updated: Updated, models: dict[str, Path]) -> None:
    reply = updated.stage(models["wide"])
    assert not reply.success and "has the shape (96, 128), the model needs (208, 128)" in reply.message


def test_no_memory_is_an_answer(updated: Updated, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "available_memory_nbytes", lambda: 1000)
    reply = updated.stage(models["new"])
    assert not reply.success and "GB more memory" in reply.message


def test_files_that_change_while_they_are_read_are_refused(
    updated: Updated, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether they were changed before this rank has read them, while it did, or beside the first node's files."""
    folder = Path(shutil.copytree(models["new"], tmp_path / "model"))
    path = folder / "model.safetensors"
    seen = file_stamps(str(folder))
    os.utime(path, ns=(1, 1))
    reply = updated.stage(folder, files=seen)
    assert not reply.success and "have changed, or are others than on the instance's first node" in reply.message
    assert updated.stage(folder, 2, files=seen, host_identity="another").success  # of the same size
    other = [file_stamps(str(models["wide"]))[0]]
    assert not updated.stage(folder, 3, files=other, host_identity="another").success
    real = CheckpointSource.fill

    def fill_slowly(self: CheckpointSource, *args: Any) -> None:
        real(self, *args)
        os.utime(path, ns=(2, 2))

    monkeypatch.setattr(CheckpointSource, "fill", fill_slowly)
    reply = updated.stage(folder, 4)
    assert not reply.success and "have changed while they were read" in reply.message


def test_bytes_that_are_not_those_of_the_files_are_refused(
    updated: Updated, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = CheckpointSource.fill

    def fill_badly(self: CheckpointSource, plan: Any, arena: Any) -> None:
        real(self, plan, arena)
        entry = arena.manifest.entries[3]
        arena.memory[entry.offset : entry.offset + entry.nbytes] = bytes(entry.nbytes)

    monkeypatch.setattr(CheckpointSource, "fill", fill_badly)
    reply = updated.stage(models["new"])
    assert not reply.success and "is not in memory what it is in the files" in reply.message


def test_ranks_whose_files_are_others_of_the_same_size_find_out(updated: Updated, models: dict[str, Path]) -> None:
    """On another node nothing but names and sizes of the files is known."""
    sizes = [[(one.name, one.nbytes) for one in file_stamps(str(models[name]))] for name in ("old", "new")]
    assert sizes[0] == sizes[1]
    told = [updated.stage(models[name], number).received for number, name in enumerate(("old", "new", "old"), 1)]
    assert told[0] == told[2] != told[1] and all(told)


def test_a_digest_is_insisted_on(updated: Updated, models: dict[str, Path]) -> None:
    reply = updated.stage(models["new"], digest="0" * 64)
    assert not reply.success and "have the digest" in reply.message


def test_what_nobody_foresaw_is_an_answer_too(
    updated: Updated, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, expected: dict[str, Any]
) -> None:
    def fail(*_args: Any) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr(weight_update, "compute_checksums", fail)
    reply = updated.stage(models["new"])
    assert not reply.success and reply.message == "KeyError('surprise')"
    assert updated.tokens() == expected["old"]


def test_what_is_dropped_while_it_is_staged_takes_no_memory_afterwards(
    updated: Updated, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And another step is refused meanwhile."""
    goes_on, begun = threading.Event(), threading.Event()
    real = weight_update.compute_checksums

    def compute_late(*args: Any) -> Any:
        begun.set()
        assert goes_on.wait(30)
        return real(*args)

    monkeypatch.setattr(weight_update, "compute_checksums", compute_late)
    engine = updated.engine
    source = FilesSource(path=str(models["new"]), host_identity=host_identity(), files=file_stamps(str(models["new"])))
    engine.send(StageWeightsReq(request_id="slow", number=1, source=source))
    engine.step()
    assert begun.wait(30) and engine.loop.has_work
    waits = []
    with monkeypatch.context() as patch:
        patch.setattr(engine.channel, "receive", lambda timeout_s: waits.append(timeout_s) or [])
        engine.loop.run_once()
    assert waits == [LOAD_POLL_S], "who stages has the processor"
    refused = updated.stage(models["new"], 2)
    assert not refused.success and "has not ended yet" in refused.message
    assert updated.ask(DropWeightsReq(request_id="drop", number=1)).success
    engine.channel.replies.clear()
    goes_on.set()
    while not engine.channel.replies:
        engine.step()
    assert not updated.versions._staged


def test_a_switch_that_fails_is_not_survived(updated: Updated, models: dict[str, Path], monkeypatch: Any) -> None:
    """The rank's loop ends, and with it the instance: other ranks may have changed."""
    updated.stage(models["new"])
    with monkeypatch.context() as patch:
        patch.setattr(host_memory, "map_file_at", lambda *_args, **_options: (_ for _ in ()).throw(OSError("refused")))
        with pytest.raises(OSError, match="refused"):
            updated.switch()
    updated.versions._staged.clear()


@pytest.mark.parametrize("quantization", [None, "fp8"])
def test_tied_and_quantised_tensors_follow(tmp_path: Path, quantization: str | None) -> None:
    """What is made of a checkpoint while it is read is made anew: the arena is that of an instance that starts."""
    folders = [rm.make_model(tmp_path / str(seed), "qwen3", seed=seed, tie_word_embeddings=True) for seed in (0, 1)]
    assert json.loads((folders[0] / "config.json").read_text())["tie_word_embeddings"]
    updated, other = Updated(folders[0], quantization=quantization), Updated(folders[1], quantization=quantization)
    assert updated.stage(folders[1]).success and updated.switch().success
    assert updated.checksums() == other.checksums()
    assert updated.tokens() == other.tokens()


def test_a_head_of_its_own_does_not_fit_a_tied_model(tmp_path: Path) -> None:
    folders = [rm.make_model(tmp_path / str(seed), "qwen3", seed=seed, tie_word_embeddings=True) for seed in (0, 1)]
    path = folders[1] / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, path)
    reply = Updated(folders[0]).stage(folders[1])
    assert not reply.success and "holds an output head of its own" in reply.message


class SlowToFree:
    """Stands in for pinned memory, which takes its time."""

    def __init__(self) -> None:
        self.may_go, self.has_gone = threading.Event(), threading.Event()

    def make(self) -> StagedWeights:
        """Weights that are gone once they may go; this object has no part in them."""

        may_go, has_gone = self.may_go, self.has_gone

        class Arena:
            def __del__(self) -> None:
                may_go.wait(30)
                has_gone.set()

        arena: Any = Arena()
        report: Any = None
        return StagedWeights(arena, report)


def test_passes_go_on_while_dropped_memory_is_freed_and_the_next_step_waits_for_it(
    updated: Updated, models: dict[str, Path], expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = SlowToFree()
    updated.versions._staged[1] = slow.make()
    assert updated.ask(DropWeightsReq(request_id="drop", number=1)).success
    assert updated.tokens() == expected["old"] and not slow.has_gone.is_set()
    monkeypatch.setattr(weight_update, "FREE_TIMEOUT_S", 0.05)
    reply = updated.stage(models["new"], number=2)
    assert not reply.success and not reply.lacks_memory and "dropped is not free after 0.05 s" in reply.message
    monkeypatch.setattr(weight_update, "FREE_TIMEOUT_S", 30.0)
    timer = threading.Timer(0.2, slow.may_go.set)
    timer.start()
    assert updated.stage(models["new"], number=2).success and slow.has_gone.is_set()
    assert updated.ask(DropWeightsReq(request_id="drop", number=2)).success
    updated.versions._dropped_memory.wait(30)


def test_what_is_dropped_is_free_without_a_collection(updated: Updated, models: dict[str, Path]) -> None:
    """Nothing else holds it: its memory file is closed when the drop has been done."""
    updated.stage(models["new"])
    fd = updated.versions._staged[1].arena.own_fd  # type: ignore[attr-defined]
    assert "ramet-weights" in os.readlink(f"/proc/self/fd/{fd}")
    gc.disable()
    try:
        updated.ask(DropWeightsReq(request_id="drop", number=1))
        updated.versions._dropped_memory.wait(30)
        assert not os.path.exists(f"/proc/self/fd/{fd}")
    finally:
        gc.enable()


def test_the_end_of_the_process_waits_for_no_memory() -> None:
    """What is being freed goes with the process."""
    script = (
        "import time; from ramet.srt.model_executor.dropped_memory import DroppedMemory\n"
        "class Slow:\n    def __del__(self): time.sleep(60)\n"
        "DroppedMemory().free([Slow()])\n"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=30).returncode == 0
