"""A client and the version of the weights that it takes, with seeds that are made up and change meanwhile."""

import logging
from pathlib import Path

import msgspec
import numpy as np
import pytest
import seed_process
from fake_seeds import TOY, FakeOpener, FakeSeed, toy_arena, toy_tensors
from ramet.srt.configs.load_config import LoadConfig
from ramet.srt.model_loader import remote_instance_loader
from ramet.srt.model_loader.client import attempt
from ramet.srt.model_loader.client.seed_finder import FoundSeeds
from ramet.srt.model_loader.client.seed_instance import SeedInstance
from ramet.srt.model_loader.client.seeds_by_address import _agreeing
from ramet.srt.model_loader.client.version_check import VersionSwitched, agreed_version
from ramet.srt.model_loader.loader import RemoteInstanceModelLoader
from ramet.srt.weights.agreement import find_disagreement
from ramet.srt.weights.errors import WeightTransferError
from ramet.srt.weights.report import LoadReport
from ramet.srt.weights.version import check_same_version, check_version
from safetensors.numpy import save_file


class ChangingSeed(FakeSeed):
    """One that names the first of its versions when it is asked, and has the weights of the next one a moment later."""

    def __init__(self, *states: tuple[str, int], **fields) -> None:
        super().__init__(1, held(*states[0]), **fields)
        self.states = list(states)

    def instance(self, manifest) -> SeedInstance:
        self.held = held(*self.states[0])
        instance = super().instance(manifest)
        if len(self.states) > 1:
            self.states.pop(0)
            self.held = held(*self.states[0])
        instance.ask_versions = lambda _timeout_s: {self.states[0][0]}
        return instance


def held(version: str, fill: int):
    arena = toy_arena(fill)
    arena.manifest = msgspec.structs.replace(arena.manifest, weight_version=version)
    return arena


class Case:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, seed: FakeSeed, fallback: str = "error") -> None:
        self.arena = toy_arena()
        self.seed = seed
        self.claim = None
        self.origin = "fake seeds"
        self.given_up: list[str] = []
        config = LoadConfig(load_format="remote_instance", fallback=fallback, local_mode="off")
        self.loader = RemoteInstanceModelLoader(config, lambda _manifest, _path: self)
        monkeypatch.setattr(attempt, "SeedSources", lambda arena, _config: FakeOpener([seed], arena, []))

    def load(self, folder: Path | str = "/nonexistent") -> LoadReport:
        return self.loader.load_weights(self.arena.manifest, self.arena, str(folder)).report

    def holds(self, fill: int) -> bool:
        return seed_process.holds(self.arena, toy_tensors(fill))

    # The finder's part: one candidate

    def candidates(self):
        yield 0

    def open(self, _candidate) -> FoundSeeds:
        return FoundSeeds("the candidate", [self.seed.instance(self.arena.manifest)])

    def give_up(self, _candidate, error) -> None:
        self.given_up.append(str(error))

    def shortage(self) -> None:
        return None

    def close(self) -> None:
        pass


@pytest.fixture(autouse=True)
def log(caplog):
    caplog.set_level(logging.INFO)
    return caplog


def test_a_client_has_the_version_of_its_seed(monkeypatch):
    case = Case(monkeypatch, ChangingSeed(("v7", 7)))
    assert case.load().weight_version == "v7" and case.holds(7)


def test_a_client_whose_seed_changes_meanwhile_starts_over(monkeypatch, log):
    case = Case(monkeypatch, ChangingSeed(("v1", 1), ("v2", 2), ("v3", 3), ("v3", 3)))
    report = case.load()
    assert report.weight_version == "v3" and report.verified and case.holds(3) and case.given_up == []
    assert "starting over" in log.text and "serves the weight version v3 now, not v2 any more" in log.text


def test_a_name_alone_that_changes_is_seen_where_nothing_can_be_compared(monkeypatch):
    seed = ChangingSeed(("v1", 1), ("v2", 1), ("v2", 1), has_checksums=False)
    assert Case(monkeypatch, seed).load().weight_version == "v2"


def test_what_was_verified_keeps_the_version_that_it_is_of(monkeypatch):
    """All bytes are those of the version that was agreed on: that the seed goes by another one now is no fault."""
    case = Case(monkeypatch, ChangingSeed(("v1", 1), ("v2", 1), ("v2", 1)))
    assert case.load().weight_version == "v1" and case.holds(1)


def test_a_seed_that_never_stops_changing_is_given_up(monkeypatch, tmp_path, log):
    monkeypatch.setattr(remote_instance_loader, "MAX_SWITCHES", 2)
    states = [(f"v{number}", number) for number in range(1, 9)]
    case = Case(monkeypatch, ChangingSeed(*states))
    with pytest.raises(WeightTransferError, match="serves the weight version v4 now, not v3 any more"):
        case.load()
    assert len(case.given_up) == 1
    case = Case(monkeypatch, ChangingSeed(*states), fallback="disk")
    shapes = TOY["shapes"]
    tensors = {name: numbers.view(np.float32).reshape(shapes[name]) for name, numbers in toy_tensors(20).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    report = case.load(tmp_path)
    assert case.holds(20) and report.source == "checkpoint" and report.weight_version == ""


def test_a_failure_without_a_change_is_that_failure(monkeypatch):
    case = Case(monkeypatch, ChangingSeed(("v1", 1), error=OSError("the cable is out")))
    with pytest.raises(WeightTransferError, match="the cable is out"):
        case.load()
    assert len(case.given_up) == 1


def test_seeds_of_several_versions_do_not_share_a_transfer(log):
    manifest = toy_arena().manifest
    one, other = FakeSeed(1, held("v1", 1)).instance(manifest), FakeSeed(2, held("v2", 1)).instance(manifest)
    with pytest.raises(VersionSwitched, match="several versions: v1, v2"):
        agreed_version([one, other], 0)
    assert _agreeing([one, other], 0) == [one]
    assert "10.0.0.1:2 is left out: its weight version is v2, that of 10.0.0.1:1 v1" in log.text


def test_a_client_that_names_a_version_takes_no_other():
    any_version, seed = toy_arena().manifest, held("v2", 1).manifest
    assert find_disagreement(any_version, seed) is None
    assert find_disagreement(seed, seed) is None
    wanted = msgspec.structs.replace(any_version, weight_version="v1")
    assert find_disagreement(wanted, seed) == "its weight version is v2, not v1"
    assert find_disagreement(wanted, any_version) == "its weight version is default, not v1"


def test_a_seed_that_does_not_say_its_version_is_of_no_use_then(monkeypatch):
    manifest = held("v1", 1).manifest
    instance = FakeSeed(1, held("v1", 1)).instance(manifest)
    silent = msgspec.structs.replace(instance.ranks[0].answer, manifest=None)
    with pytest.raises(WeightTransferError, match="does not say its weight version, which must be v1"):
        SeedInstance.of_answer("upstream", silent, LoadConfig(), manifest)


def test_ranks_of_one_instance_have_one_version():
    check_same_version({0: "a", 2: "a"})
    with pytest.raises(ValueError, match=r"rank 3 has loaded the weight version 'b', and rank 0 'a'"):
        check_same_version({0: "a", 1: "a", 3: "b"})


@pytest.mark.parametrize("name", ["", "a\nb", "x" * 257])
def test_a_version_is_a_name(name):
    with pytest.raises(ValueError, match="--weight-version must be 1 to 256 printable characters"):
        check_version(name, "--weight-version")
