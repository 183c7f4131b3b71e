"""Tensors that come to a scheduler in several calls: served when all have come, and never if one can't be taken."""

from pathlib import Path

import pytest
import random_models as rm
from ramet.srt.utils import host_memory
from ramet.srt.weights.update_messages import DropWeightsReq, MadeUpSource, StageWeightsReq
from safetensors.torch import load_file, save_file
from updated_engine import NUM_TOKENS, PROMPTS, Updated


class Buckets:
    """Two checkpoints of a model, and the second one's tensors in two files."""

    def __init__(self, folder: Path) -> None:
        self.old, self.new = (rm.make_model(folder / str(seed), "llama3", seed=seed) for seed in (0, 1))
        tensors = load_file(self.new / "model.safetensors")
        names = sorted(tensors)
        self.files = [folder / f"bucket-{index}.safetensors" for index in (0, 1)]
        for index, path in enumerate(self.files):
            save_file({name: tensors[name] for name in names[index::2]}, path)


@pytest.fixture(scope="module")
def buckets(tmp_path_factory: pytest.TempPathFactory) -> Buckets:
    return Buckets(tmp_path_factory.mktemp("buckets"))


def test_buckets_serve_after_the_switch(buckets: Buckets) -> None:
    updated = Updated(buckets.old)
    old = updated.checksums()
    expected = {path: rm.hf_greedy(path, PROMPTS, NUM_TOKENS) for path in (buckets.old, buckets.new)}
    for index, path in enumerate(buckets.files):
        reply = updated.put(path, is_first=not index)
        assert reply.success and reply.source == "tensors" and reply.num_bytes > 0, reply.message
    assert updated.tokens() == expected[buckets.old]
    assert updated.seal().success and updated.switch().success
    assert updated.tokens() == expected[buckets.new]
    assert updated.checksums() == Updated(buckets.new).checksums() != old
    assert updated.versions.weights.report.verified and updated.versions.weights.report.source == "tensors"
    assert updated.switch(0, "old").success and updated.checksums() == old


def test_after_a_reset_all_tensors_must_come(buckets: Buckets) -> None:
    updated = Updated(buckets.old)
    reset = StageWeightsReq(request_id="reset", number=1, source=MadeUpSource(random_seed=1))
    assert updated.ask(reset).success and updated.switch(1).success
    assert updated.put(buckets.files[0], 2).success
    reply = updated.seal(2)
    assert not reply.success and "nothing serves that could stay, and model." in reply.message
    for index, path in enumerate(buckets.files):
        assert updated.put(path, 3, is_first=not index).success
    assert updated.seal(3).success and updated.switch(3).success
    assert updated.checksums() == Updated(buckets.new).checksums()
    updated.put(buckets.files[0], 4)
    assert updated.seal(4).success  # nothing of it is made up any more


def test_a_bucket_that_fails_leaves_nothing_and_the_next_session_works(buckets: Buckets, tmp_path: Path) -> None:
    updated = Updated(buckets.old)
    old = updated.checksums()
    bad = tmp_path / "bad.safetensors"
    save_file({"model.layers.7.mlp.up_proj.weight": load_file(buckets.files[0])["model.norm.weight"]}, bad)
    assert updated.put(buckets.files[0]).success
    reply = updated.put(bad, is_first=False)
    assert not reply.success and "the model has no tensor model.layers.7.mlp.up_proj.weight" in reply.message
    for reply in (updated.put(buckets.files[1], is_first=False), updated.seal()):
        assert not reply.success and "of these weights is lost" in reply.message
    assert updated.checksums() == old and not updated.versions._staged and not updated.versions._open
    for index, path in enumerate(buckets.files):
        assert updated.put(path, 2, is_first=not index).success
    assert updated.seal(2).success and updated.switch(2).success
    assert updated.checksums() == Updated(buckets.new).checksums()


def test_what_is_dropped_takes_no_memory(buckets: Buckets) -> None:
    updated = Updated(buckets.old)
    assert updated.put(buckets.files[0]).success and updated.versions._open
    assert updated.ask(DropWeightsReq(request_id="drop", number=1)).success
    assert not updated.versions._open
    updated.versions.drop(2)  # before it comes
    assert updated.put(buckets.files[0], 2).success and not updated.versions._open


def test_no_memory_is_an_answer(buckets: Buckets, monkeypatch: pytest.MonkeyPatch) -> None:
    updated = Updated(buckets.old)
    monkeypatch.setattr(host_memory, "available_memory_nbytes", lambda: 1000)
    reply = updated.put(buckets.files[0])
    assert not reply.success and "GB more memory" in reply.message
