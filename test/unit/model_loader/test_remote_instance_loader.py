"""The one loop over candidates and the one fallback behind it, with finders and seeds that are made up."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
import seed_process
from fake_seeds import TOY, FakeOpener, FakeSeed, toy_arena, toy_tensors
from ramet.srt.configs.load_config import LoadConfig
from ramet.srt.model_loader.client import attempt, seeds_by_address, transfer
from ramet.srt.model_loader.client.seed_finder import FoundSeeds
from ramet.srt.model_loader.client.seed_instance import SeedInstance
from ramet.srt.model_loader.client.seeds_by_address import SeedsByAddress
from ramet.srt.model_loader.loader import RemoteInstanceModelLoader
from ramet.srt.utils.net import SeedAddress
from ramet.srt.weights.errors import WeightTransferError
from ramet.srt.weights.manifest import WeightManifest
from ramet.srt.weights.registration import SeedAnswer
from ramet.srt.weights.report import LoadReport
from safetensors.numpy import save_file

FILES = 9  # the fill of the toy model in the files


class FakeClaim:
    def __init__(self) -> None:
        self.num_releases = 0

    def release(self) -> None:
        self.num_releases += 1


class FakeFinder:
    """Gives candidates: each a list of seeds, or the error with which it can't be opened."""

    origin = "fake seeds"

    def __init__(
        self,
        manifest: WeightManifest,
        candidates: Sequence[list[FakeSeed] | WeightTransferError],
        reason: str = "",
        claim: FakeClaim | None = None,
    ) -> None:
        self._manifest = manifest
        self._candidates = candidates
        self._reason = reason
        self.claim = claim
        self.given_up: list[tuple[int, str]] = []
        self.is_closed = False

    def candidates(self) -> Iterator[int]:
        yield from range(len(self._candidates))

    def open(self, candidate: int) -> FoundSeeds:
        seeds = self._candidates[candidate]
        if isinstance(seeds, WeightTransferError):
            raise seeds
        worker_ids = {0: f"worker {candidate}"} if self.claim is not None else {}
        return FoundSeeds(f"candidate {candidate}", [seed.instance(self._manifest) for seed in seeds], worker_ids)

    def give_up(self, candidate: int, error: WeightTransferError) -> None:
        self.given_up.append((candidate, str(error)))

    def shortage(self) -> WeightTransferError | None:
        return WeightTransferError("find", 0, "the fleet", self._reason) if self._reason else None

    def close(self) -> None:
        self.is_closed = True


class Case:
    """One load: its seeds, its finder, and a folder with other numbers than theirs unless it is told."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        *candidates: list[FakeSeed] | WeightTransferError,
        fallback: str = "disk",
        reason: str = "",
        claim: FakeClaim | None = None,
    ) -> None:
        self.arena = toy_arena()
        self.finder = FakeFinder(self.arena.manifest, candidates, reason, claim)
        config = LoadConfig(load_format="remote_instance", fallback=fallback, local_mode="off")
        self.loader = RemoteInstanceModelLoader(config, lambda _manifest, _path: self.finder)
        seeds = [seed for one in candidates if isinstance(one, list) for seed in one]
        ends: list[str] = []
        monkeypatch.setattr(attempt, "SeedSources", lambda arena, _config: FakeOpener(seeds, arena, ends))

    def load(self, folder: Path | str = "/nonexistent") -> LoadReport:
        report, claim = self.loader.load_weights(self.arena.manifest, self.arena, str(folder))
        assert claim is self.finder.claim and self.finder.is_closed
        return report

    def holds(self, fill: int = 1) -> bool:
        return seed_process.holds(self.arena, toy_tensors(fill))


@pytest.fixture(autouse=True)
def small_grain(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(transfer, "SHARED_BYTES", 1 << 10)
    caplog.set_level(logging.INFO)


def write_files(folder: Path, fill: int = FILES) -> Path:
    tensors = toy_tensors(fill)
    shapes = TOY["shapes"]
    save_file(
        {name: tensors[name].view(np.float32).reshape(shapes[name]) for name in shapes}, folder / "model.safetensors"
    )
    return folder


def absent(name: str) -> WeightTransferError:
    return WeightTransferError("ask", 0, name, f"{name} is not there")


def good(port: int = 1) -> FakeSeed:
    return FakeSeed(port, toy_arena(fill=1))


def dying(port: int, num_good: int = 5) -> FakeSeed:
    return FakeSeed(port, toy_arena(fill=1), error=ConnectionResetError(f"seed {port} has gone"), num_good=num_good)


def test_the_first_candidate_that_serves_ends_the_search(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    unused = good(2)
    case = Case(monkeypatch, [good(1)], [unused])
    report = case.load()
    assert case.holds() and unused.asked == [] and case.finder.given_up == []
    assert (report.source, report.verified, report.fallback_reason) == ("fake", True, "")
    assert report.taken_from == ("10.0.0.1:1",) and report.taken_bytes == (report.num_bytes,) and report.seconds > 0


@pytest.mark.parametrize("first", [absent("a"), [dying(1)]], ids=["can't be opened", "breaks off"])
def test_when_the_first_fails_the_second_serves(
    monkeypatch: pytest.MonkeyPatch, first: list[FakeSeed] | WeightTransferError
) -> None:
    case = Case(monkeypatch, first, [good(2)])
    report = case.load()
    assert case.holds() and [candidate for candidate, _ in case.finder.given_up] == [0]
    assert report.taken_from == ("10.0.0.1:2",) and report.fallback_reason == "" and report.verified


def test_a_candidate_that_lies_is_given_up_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    liar = FakeSeed(1, toy_arena(fill=1), lies_at=0)
    case = Case(monkeypatch, [liar], [good(2)])
    assert case.load().taken_from == ("10.0.0.1:2",) and case.holds()
    ((_, reason),) = case.finder.given_up
    assert "the checksums of 1 tensors differ" in reason


def test_when_all_fail_the_files_are_read_and_the_report_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    case = Case(monkeypatch, absent("a"), absent("b"), reason="nobody is ready")
    report = case.load(write_files(tmp_path))
    assert case.holds(FILES) and (report.source, report.verified) == ("checkpoint", False)
    assert all(words in report.fallback_reason for words in ("a is not there", "b is not there", "nobody is ready"))
    assert f"no weights from fake seeds, loading from disk instead: {report.fallback_reason}" in caplog.text


def test_when_all_fail_and_files_are_not_wanted_all_reasons_are_in_one_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    case = Case(monkeypatch, absent("a"), [dying(1)], fallback="error", reason="nobody is ready")
    with pytest.raises(WeightTransferError) as error:
        case.load(write_files(tmp_path))
    assert all(words in str(error.value) for words in ("a is not there", "seed 1 has gone", "nobody is ready"))
    assert error.value.stage == "find" and case.finder.is_closed


def test_the_only_error_is_raised_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    error = absent("a")
    with pytest.raises(WeightTransferError) as raised:
        Case(monkeypatch, error, fallback="error").load()
    assert raised.value is error


def test_where_nobody_has_the_weights_yet_files_are_read_and_are_no_fallback(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    case = Case(monkeypatch, claim=FakeClaim())
    report = case.load(write_files(tmp_path))
    assert case.holds(FILES) and report.source == "checkpoint" and report.fallback_reason == ""
    assert "no instance has the weights of toy yet: reading the files" in caplog.text
    assert case.finder.claim is not None and case.finder.claim.num_releases == 0


def test_without_seeds_and_without_files_both_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    claim = FakeClaim()
    case = Case(monkeypatch, absent("a"), claim=claim)
    with pytest.raises(ValueError, match=r"no weights from the seed \(.*a is not there\), and none from disk \("):
        case.load(tmp_path)
    assert claim.num_releases == 1 and case.finder.is_closed


@pytest.mark.parametrize("error", [MemoryError("no memory"), KeyboardInterrupt()], ids=["memory", "interrupt"])
def test_whatever_ends_a_load_releases_the_claim(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    claim = FakeClaim()
    case = Case(monkeypatch, [good()], claim=claim)

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(attempt.SeedTransfer, "run", fail)
    with pytest.raises(type(error)):
        case.load()
    assert claim.num_releases == 1 and case.finder.is_closed


# What a transfer that broke off has given


def test_files_fill_only_what_a_broken_off_transfer_has_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seed = dying(1, num_good=5)
    case = Case(monkeypatch, [seed])
    report = case.load(write_files(tmp_path, fill=1))
    sent = sum(stop - start for start, stop in seed.asked_for(0)[:5])
    assert case.holds() and (report.source, report.verified) == ("fake+checkpoint", True)
    assert (report.taken_from, report.taken_bytes) == (("10.0.0.1:1",), (sent,))
    assert report.num_bytes >= sent + 27 * 1024 and "seed 1 has gone" in report.fallback_reason
    assert case.arena.checksums is not None


def test_what_a_source_of_a_metadata_server_gave_goes_by_its_worker_id(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    case = Case(monkeypatch, [dying(1)], claim=FakeClaim())
    assert case.load(write_files(tmp_path, fill=1)).taken_from == ("worker 0",)


def test_a_candidate_that_was_only_asked_takes_nothing_from_what_another_gave(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    case = Case(monkeypatch, [dying(1)], absent("b"))
    report = case.load(write_files(tmp_path, fill=1))
    assert case.holds() and report.source == "fake+checkpoint" and report.taken_from == ("10.0.0.1:1",)


def test_files_that_are_not_what_the_seed_has_are_read_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    case = Case(monkeypatch, [dying(1)])
    report = case.load(write_files(tmp_path, fill=FILES))
    assert case.holds(FILES) and report.source == "checkpoint" and report.taken_from == ()


def test_what_can_not_be_checked_is_not_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seed = dying(1)
    seed.has_checksums = False
    case = Case(monkeypatch, [seed])
    assert case.load(write_files(tmp_path)).source == "checkpoint" and case.holds(FILES)


def test_a_seed_of_another_model_leaves_nothing_though_its_transfer_was_whole(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_files(tmp_path)
    theirs, own = ({"fields": {"model_name": str(path)}} for path in (tmp_path / "theirs", tmp_path))
    case = Case(monkeypatch, [dying(1)], [FakeSeed(2, toy_arena(fill=1, **theirs))])
    case.arena = toy_arena(**own)
    case.finder._manifest = case.arena.manifest
    report = case.load(tmp_path)
    assert report.source == "checkpoint" and case.holds(FILES)
    assert "other weights than the files" in report.fallback_reason


# Seeds by address


def test_addresses_are_one_candidate_and_claim_nothing() -> None:
    seeds = (SeedAddress("a", 1), SeedAddress("b", 2, "https"))
    finder = SeedsByAddress(LoadConfig(seeds=seeds), toy_arena().manifest)
    assert list(finder.candidates()) == ["a:1, https://b:2"] and finder.origin == "the seed a:1, https://b:2"
    assert finder.claim is None and finder.shortage() is None


def test_without_an_address_there_is_nothing_to_ask() -> None:
    with pytest.raises(ValueError, match="needs the seed's address and port, or ModelExpress"):
        SeedsByAddress(LoadConfig(), toy_arena().manifest)


class TestAsking:
    """Several seeds at once; what each of them does is said by its port."""

    @pytest.fixture(autouse=True)
    def answers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        held = {1: toy_arena(fill=1), 2: toy_arena(fill=1), 3: toy_arena(fill=2)}

        def find_ranks(instance: SeedInstance) -> None:
            port = instance.server.address.port
            if port == 500:
                raise absent(instance.name)
            if port == 501:
                raise KeyError("a mistake in the code")
            instance.ranks += FakeSeed(port, held[port]).instance(held[port].manifest).ranks

        monkeypatch.setattr(SeedInstance, "find_ranks", find_ranks)
        monkeypatch.setattr(seeds_by_address, "LATE_GRACE_S", 0.5)

    def found(self, *ports: int) -> list[int]:
        seeds = tuple(SeedAddress("10.0.0.1", port) for port in ports)
        finder = SeedsByAddress(LoadConfig(seeds=seeds, timeout_s=1.0), toy_arena().manifest)
        return [one.server.address.port for one in finder.open(next(finder.candidates())).instances]

    def test_those_that_answer_are_taken_in_the_given_order(self, caplog: pytest.LogCaptureFixture) -> None:
        assert self.found(2, 500, 1) == [2, 1]
        assert "the seed 10.0.0.1:500 is left out: ask failed" in caplog.text

    def test_one_with_other_weights_than_the_first_is_left_out(self, caplog: pytest.LogCaptureFixture) -> None:
        assert self.found(3, 1) == [3]
        assert "its weights are not those of 10.0.0.1:3: w0, w1" in caplog.text

    @pytest.mark.parametrize(("now", "expected"), [("the same", 1), ("other", 3), ("gone", 1)])
    def test_one_that_has_changed_since_it_was_asked_is_asked_again(
        self, monkeypatch: pytest.MonkeyPatch, now: str, expected: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        """But not for ever."""
        caplog.set_level("INFO")
        finder = SeedsByAddress(LoadConfig(seeds=(SeedAddress("10.0.0.1", 1),), timeout_s=1.0), toy_arena().manifest)
        opened: list[FoundSeeds] = []

        def ask(_server: object, rank: int, role: str, _timeout_s: float, *, start_grace_s: float) -> SeedAnswer:
            assert (rank, role, start_grace_s) == (0, "target", 0.0)
            known = opened[-1].instances[0].ranks[0].answer
            if now == "gone":
                raise absent("10.0.0.1:1")
            return known if now == "the same" else msgspec.structs.replace(known, started_at=known.started_at + 1)

        monkeypatch.setattr(seeds_by_address, "fetch_seed_answer", ask)
        candidates = finder.candidates()
        while candidate := next(candidates, None):
            opened += [finder.open(candidate)]
        assert len(opened) == expected and caplog.text.count("starting over") == expected - 1

    def test_when_none_has_the_weights_all_are_named(self) -> None:
        with pytest.raises(WeightTransferError, match="10.0.0.1:500 is not there"):
            self.found(500)

    def test_a_mistake_in_the_code_is_not_taken_for_a_seed_s_failure(self) -> None:
        with pytest.raises(KeyError, match="a mistake"):
            self.found(501)
