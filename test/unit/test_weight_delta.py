"""Deltas: a result as of a full load, on every rank; small; and refused on anything but the base that they name."""

import json
from pathlib import Path
from typing import Any

import fp8_models
import pytest
import random_models as rm
import sharded_models as sm
import torch
from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.model_executor.weight_delta import stage_delta
from ramet.srt.model_loader.arena.base import WeightArena
from ramet.srt.model_loader.checkpoint.describe_model import describe_whole_model
from ramet.srt.model_loader.checkpoint.digest_store import compute_table
from ramet.srt.model_loader.checkpoint.file_stamps import file_stamp
from ramet.srt.model_loader.checksums.entries import compute_checksums
from ramet.srt.model_loader.delta_writer import write_delta
from ramet.srt.utils.net import host_identity
from ramet.srt.weights.update_messages import DeltaFile, StageWeightsReq
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from updated_engine import Updated

UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.norm.weight"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(autouse=True)
def _own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAMET_DIGEST_DIR", str(tmp_path / "digests"))


class Case:
    """A checkpoint, what has become of it, and the delta between them."""

    def __init__(
        self, folder: Path, family: str = "llama3", *, share: float = 0.01, by: str = "values", **options: Any
    ):
        self.old = rm.make_model(folder / "old", family, dtype="bfloat16", **options)
        self.new = rm.without_weights(self.old, folder / "new")
        self.path = folder / "step.delta"
        self.before, self.after = load_file(self.old / "model.safetensors"), {}
        generator = torch.Generator().manual_seed(1)
        for name, tensor in self.before.items():
            places = torch.rand(tensor.shape, generator=generator) < share
            self.after[name] = torch.where(places, tensor + 0.25, tensor)
        save_file(self.after, self.new / "model.safetensors")
        self.table = write_delta(str(self.path), self.before, self.after, by=by)

    def source(self, **fields: Any) -> DeltaFile:
        known = {"path": str(self.path), "digest": None, "host_identity": host_identity()}
        return DeltaFile(**(known | {"stamp": file_stamp(str(self.path))} | fields))

    def rewrite(self, metadata: dict[str, str] | None = None, **tensors: torch.Tensor | None) -> None:
        """Change the delta's file."""
        with safe_open(self.path, "pt") as file:
            said = file.metadata() | (metadata or {})
        content = {name: one for name, one in (load_file(self.path) | tensors).items() if one is not None}
        save_file(content, self.path, said)


def staged(case: Case, parallel: ParallelConfig | None = None, **source: Any) -> tuple[WeightArena, tuple[str, ...]]:
    """What a rank that serves the old checkpoint makes of a delta, and what a load of the new one would have."""
    model = sm.build_model(case.old, parallel or ParallelConfig())
    serving = fp8_models.load_arena(case.old, model)
    before = compute_checksums(serving.manifest, serving)
    serving.checksums = before
    serving.publish()
    whole = describe_whole_model(model.config, serving.manifest)
    try:
        stage, report = stage_delta(case.source(**source), serving, serving.manifest, whole)
    finally:
        assert compute_checksums(serving.manifest, serving) == before
    assert report.verified and report.source == "delta" and report.digest == case.table.digest
    other = fp8_models.load_arena(case.new, model)
    return stage, compute_checksums(other.manifest, other).values


@pytest.mark.parametrize("by", ["values", "xor"])
@pytest.mark.parametrize("family", ["llama3", "phi3", "qwen3_moe", "qwen3_vl_moe"])
def test_a_delta_makes_what_a_load_would_have(tmp_path: Path, family: str, by: str) -> None:
    """On every rank; the digest is that of the new files. Some tensors are there as a whole, some in part."""
    case = Case(tmp_path, family, by=by)
    assert compute_table(str(case.new)).digest == case.table.digest
    names = load_file(case.path).keys()
    assert any(name.endswith("::indices") for name in names) and NORM in names or family != "llama3"
    for parallel in sm.all_ranks(2, 2 if "moe" in family else 1):
        stage, loaded = staged(case, parallel)
        assert stage.checksums is not None and stage.checksums.values == loaded
        assert stage.content_digest_text == case.table.digest


def test_one_per_cent_takes_less_than_five_per_cent_of_the_bytes(tmp_path: Path) -> None:
    case = Case(tmp_path, "llama3", hidden_size=512, intermediate_size=1024, num_hidden_layers=2, vocab_size=2048)
    nbytes = sum(tensor.nbytes for tensor in case.before.values())
    assert nbytes > 8_000_000
    assert case.path.stat().st_size <= 0.05 * nbytes
    stage, loaded = staged(case)
    assert stage.checksums is not None and stage.checksums.values == loaded


def test_deltas_follow_each_other_without_reading_everything_again(tmp_path: Path) -> None:
    case = Case(tmp_path)
    engine = Updated(case.old)
    later = {name: tensor + 0.5 if name == NORM else tensor for name, tensor in case.after.items()}
    second = tmp_path / "second.delta"
    table = write_delta(str(second), case.after, later, base_table=case.table)
    assert set(load_file(second)) == {NORM, "::base", "::changed"}

    def stage(number: int, path: Path) -> Any:
        source = case.source(path=str(path), stamp=file_stamp(str(path)))
        return engine.ask(StageWeightsReq(request_id=str(number), number=number, source=source))

    reply = stage(1, second)
    assert not reply.success and "belongs on weights of the digest" in reply.message and "differ" in reply.message
    reply = stage(2, case.path)
    assert reply.success and reply.source == "delta" and 0 < reply.num_bytes < case.path.stat().st_size, reply.message
    assert reply.received == case.table.digest  # by which the ranks of several nodes know that they have the same file
    assert engine.switch(2).success
    assert engine.checksums() == Updated(case.new).checksums()
    assert engine.versions.arena.content_digest_text == case.table.digest
    reply = stage(3, case.path)
    assert not reply.success and f"those that serve have {case.table.digest}" in reply.message
    assert stage(4, second).success and engine.switch(4).success
    assert engine.versions.arena.content_digest_text == table.digest
    assert engine.switch(0, "old").success and engine.checksums() == Updated(case.old).checksums()


def test_a_delta_on_other_weights_is_refused_before_it_takes_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By every byte, and by the digest where that is known."""
    case = Case(tmp_path)
    other = dict(case.before)
    other[UP] = other[UP].clone()
    other[UP][5, 5] += 1
    save_file(other, case.old / "model.safetensors")
    monkeypatch.setattr("ramet.srt.model_executor.weight_delta.TensorStage", None)
    with pytest.raises(ValueError, match=r"those that serve are others: model.layers.1.mlp.gate_up_proj.weight differ"):
        staged(case)
    digest = compute_table(str(case.old)).digest
    with pytest.raises(ValueError, match=f"those that serve have {digest}"):
        staged(case)


def test_an_instance_that_can_t_tell_refuses(tmp_path: Path) -> None:
    """One that holds float32 files in bfloat16, say."""
    case = Case(tmp_path)
    wide = {name: tensor.float() for name, tensor in case.before.items()}
    after = {name: tensor.float() for name, tensor in case.after.items()}
    case.table = write_delta(str(case.path), wide, after)
    with pytest.raises(ValueError, match="nobody can tell whether those that serve are these: .* is float32 in the"):
        staged(case)


def test_a_tied_head_stays_tied(tmp_path: Path) -> None:
    case = Case(tmp_path)
    head = "lm_head.weight"
    before, after = case.before | {head: case.before[EMBEDDING]}, case.after | {head: case.after[EMBEDDING]}
    case.table = write_delta(str(case.path), before, after)
    stage, loaded = staged(case)
    assert stage.checksums is not None and stage.checksums.values == loaded
    case.table = write_delta(str(case.path), before, case.after | {head: case.before[EMBEDDING]})
    with pytest.raises(ValueError, match="makes an output head that is not the embedding"):
        staged(case)


@pytest.mark.parametrize("by", ["values", "xor"])
def test_quantised_matrices_may_change_without_their_scales(tmp_path: Path, by: str) -> None:
    """What belongs together is known by the digest."""
    plain = rm.make_model(tmp_path / "plain", "qwen3", dtype="bfloat16")
    case = Case(tmp_path / "unused")
    case.old = fp8_models.write_fp8(plain, tmp_path / "old", "rows")
    case.new = rm.without_weights(case.old, tmp_path / "new")
    before = load_file(case.old / "model.safetensors")
    after = dict(before)
    bits = after[UP].view(torch.uint8).clone()
    bits[3, 7:9] ^= 1
    after[UP] = bits.view(torch.float8_e4m3fn)
    save_file(after, case.new / "model.safetensors")
    case.table = write_delta(str(case.path), before, after, by=by)
    assert load_file(case.path)[f"{UP}::values"].dtype == (torch.uint8 if by == "xor" else torch.float8_e4m3fn)
    for parallel in sm.all_ranks(2):
        stage, loaded = staged(case, parallel)
        assert stage.checksums is not None and stage.checksums.values == loaded


def damaged() -> list[Any]:
    def cut(case: Case) -> None:
        case.path.write_bytes(case.path.read_bytes()[:-10])

    def wrong_whole(case: Case) -> None:
        case.rewrite(**{NORM: load_file(case.path)[NORM] + 1})

    def wrong_value(case: Case) -> None:
        values = load_file(case.path)[f"{UP}::values"]
        case.rewrite(**{f"{UP}::values": values + 1})

    def places(change: Any) -> Any:
        def damage(case: Case) -> None:
            case.rewrite(**{f"{UP}::indices": change(load_file(case.path)[f"{UP}::indices"].clone())})

        return damage

    def elements(**fields: Any) -> Any:
        def damage(case: Case) -> None:
            with safe_open(case.path, "pt") as file:
                said = json.loads(file.metadata()["elements"])
            said[UP] |= fields
            case.rewrite({"elements": json.dumps(said)})

        return damage

    return [
        pytest.param(cut, "truncated|reaches|beyond|bytes", id="cut off"),
        pytest.param(wrong_whole, f"{NORM} is not what its hashes are of", id="another tensor"),
        pytest.param(wrong_value, "does not make what it says of model.layers.1.mlp.gate_up", id="another element"),
        pytest.param(places(lambda one: one + 1), "does not make what it says", id="other places"),
        pytest.param(places(lambda one: one.flip(0)), "don't rise", id="falling places"),
        pytest.param(places(lambda one: one + (1 << 20)), "don't rise from 0 to", id="places beyond"),
        pytest.param(places(lambda one: one - (1 << 20)), "don't rise from 0 to", id="places before"),
        pytest.param(places(lambda one: one[1:]), "the elements of .* are", id="fewer places"),
        pytest.param(places(lambda one: one.float()), "at float32", id="places of another type"),
        pytest.param(places(lambda one: None), "::indices should not be there, or should", id="no places"),
        pytest.param(lambda case: case.rewrite(extra=torch.zeros(1)), "extra should not be there", id="surplus"),
        pytest.param(lambda case: case.rewrite(**{"::base": None}), "is no delta: it has no hashes", id="no hashes"),
        pytest.param(lambda case: case.rewrite({"format": "other"}), "no delta of the format", id="format"),
        pytest.param(lambda case: case.rewrite({"base": "0" * 64}), "not those that its digests are of", id="base"),
        pytest.param(lambda case: case.rewrite({"digest": "0" * 64}), "not those that its digests", id="digest"),
        pytest.param(lambda case: case.rewrite({"elements": "[]"}), "a broken delta", id="elements"),
        pytest.param(lambda case: case.rewrite({"elements": "{}"}), "should not be there, or should", id="none"),
        pytest.param(elements(by="sum"), "given by 'sum'", id="by"),
        pytest.param(elements(shape=[1, 2]), "which its hashes don't have", id="shape"),
        pytest.param(elements(by="xor"), "the elements of .* are bfloat16", id="values as bits"),
        pytest.param(lambda case: case.path.write_bytes(b"x"), "no safetensors file", id="no file"),
    ]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("shared"))


@pytest.mark.parametrize(("damage", "words"), damaged())
def test_a_delta_that_is_not_what_it_says_is_refused(shared: Case, damage: Any, words: str) -> None:
    whole = shared.path.read_bytes()
    try:
        damage(shared)
        with pytest.raises(ValueError, match=words):
            staged(shared)
    finally:
        shared.path.write_bytes(whole)


def test_another_digest_or_a_file_that_has_changed_is_refused(shared: Case) -> None:
    with pytest.raises(ValueError, match=f"makes weights of the digest {shared.table.digest}, not 000"):
        staged(shared, digest="0" * 64)
    stage, _ = staged(shared, digest=shared.table.digest)
    assert stage.content_digest_text == shared.table.digest
    stamp = shared.source().stamp
    shared.path.write_bytes(shared.path.read_bytes())
    with pytest.raises(ValueError, match="have changed"):
        staged(shared, stamp=stamp)


def test_only_versions_of_one_checkpoint_have_a_delta(tmp_path: Path) -> None:
    one = {"a": torch.zeros(3)}
    path = str(tmp_path / "delta")
    for new, words in (
        ({"b": torch.zeros(3)}, "only one of the checkpoints has"),
        ({"a": torch.zeros(4)}, "a is torch.float32 .*, and was"),
        ({"a": torch.zeros(3).bfloat16()}, "a is torch.bfloat16 .*, and was"),
    ):
        with pytest.raises(ValueError, match=words):
            write_delta(path, one, new)
    with pytest.raises(ValueError, match="by must be values or xor"):
        write_delta(path, one, one, by="sum")
    assert not list(tmp_path.iterdir())
