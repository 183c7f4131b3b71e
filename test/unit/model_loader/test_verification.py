"""What is compared with what the seeds say, what can't be, and whose word counts."""

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from fake_seeds import FakeSeed, toy_arena
from ramet.srt.configs.load_config import LoadConfig
from ramet.srt.model_loader import remote_instance_weight_loader_utils as utils
from ramet.srt.model_loader.arena.base import WeightArena
from ramet.srt.model_loader.checksums import regions
from ramet.srt.model_loader.checksums.entries import compute_checksums, with_checksums
from ramet.srt.model_loader.checksums.regions import RegionChecksums, WeightRegion
from ramet.srt.model_loader.client import verification
from ramet.srt.model_loader.client.verification import ChecksumMismatch, verify_by_entries, verify_by_regions
from ramet.srt.model_loader.remote_instance_weight_loader_utils import SeedServer
from ramet.srt.utils.net import SeedAddress
from ramet.srt.weights.errors import WeightTransferError
from ramet.srt.weights.manifest import WeightManifest
from ramet.srt.weights.registration import ChecksumsAnswer, ChecksumsRequest


def announced(arena: WeightArena) -> WeightManifest:
    """The manifest of a seed that has these weights."""
    return with_checksums(arena.manifest, compute_checksums(arena.manifest, arena))


def spoil(arena: WeightArena, name: str) -> None:
    entry = next(entry for entry in arena.manifest.entries if entry.name == name)
    arena.memory[entry.offset + entry.nbytes // 2] ^= 1


def test_equal_weights_are_verified_and_the_arena_knows_its_checksums() -> None:
    arena, seed = toy_arena(fill=1), toy_arena(fill=1)
    assert verify_by_entries(arena, [announced(seed)], "seed") == []
    assert arena.checksums == compute_checksums(arena.manifest, arena)


@pytest.mark.parametrize("samples_only", [False, True])
def test_tensors_that_differ_are_named(samples_only: bool) -> None:
    arena, seed = toy_arena(fill=1), toy_arena(fill=1)
    for name in ("w3", "w17"):
        spoil(arena, name)
    with pytest.raises(ChecksumMismatch, match="of 2 tensors differ from the seed's: w3, w17") as mismatch:
        verify_by_entries(arena, [announced(seed)], "a:1", samples_only=samples_only)
    assert [entry.name for entry in mismatch.value.entries] == ["w3", "w17"]
    assert (mismatch.value.stage, mismatch.value.seed) == ("verify", "a:1")
    assert arena.checksums is None


def test_what_no_seed_has_just_so_is_left_over() -> None:
    arena = toy_arena(fill=1)
    assert verify_by_entries(arena, [], "seed") == list(arena.manifest.entries)
    assert verify_by_entries(arena, [arena.manifest], "seed") == list(arena.manifest.entries)  # without checksums
    assert arena.checksums is None


def test_several_manifests_make_one() -> None:
    """Ranks of a seed of another topology: each has some of the tensors just so."""
    arena = toy_arena(fill=1)
    manifest = announced(arena)
    assert manifest.checksums is not None
    parts = []
    for chosen in (slice(0, 10), slice(10, 30)):
        checksums = msgspec.structs.replace(
            manifest.checksums, values=manifest.checksums.values[chosen], samples=manifest.checksums.samples[chosen]
        )
        parts.append(msgspec.structs.replace(manifest, entries=manifest.entries[chosen], checksums=checksums))
    rest = verify_by_entries(arena, parts, "seed")
    assert [entry.name for entry in rest] == [entry.name for entry in manifest.entries[30:]]


def test_checksums_of_another_algorithm_say_nothing() -> None:
    arena = toy_arena(fill=1)
    manifest = announced(arena)
    assert manifest.checksums is not None
    other = msgspec.structs.replace(manifest.checksums, algorithm="another")
    rest = verify_by_entries(arena, [msgspec.structs.replace(manifest, checksums=other)], "seed")
    assert rest == list(arena.manifest.entries)


# Pieces that the seed's ranks are asked for


def test_a_rank_computes_with_rests_and_no_more_bytes_than_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    arena = toy_arena(fill=1)
    wanted = [WeightRegion(box.checkpoint_name, box.source) for e in arena.manifest.entries for box in e.boxes]
    rests: list[float] = []
    monkeypatch.setattr(regions.time, "sleep", rests.append)
    checksums = RegionChecksums(arena)
    assert checksums.compute(wanted) == checksums.compute(wanted, 2)
    assert len(rests) == -(-len(wanted) // 16) > 1
    checksums.check_size(wanted)
    with pytest.raises(ValueError, match="more than twice this rank's weights"):
        checksums.check_size(wanted * 3)


def test_many_pieces_are_asked_for_in_several_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    answers = [503, 200, 200]

    def post(_server: SeedServer, _path: str, body: ChecksumsRequest, _timeout_s: float) -> tuple[int, bytes]:
        sizes.append(len(body.regions))
        checksums = [region.checkpoint_name for region in body.regions]
        return answers.pop(0), msgspec.json.encode(ChecksumsAnswer(algorithm="a", checksums=checksums))

    monkeypatch.setattr(utils, "post_to_seed", post)
    monkeypatch.setattr(utils, "POLL_PERIOD_S", 0.01)
    wanted = [WeightRegion(f"w{number}", ()) for number in range(5000)]
    answer = utils.fetch_checksums(
        SeedServer(SeedAddress("h", 1)), ChecksumsRequest(rank=0, regions=wanted), timeout_s=5
    )
    assert answer is not None and answer.checksums == [region.checkpoint_name for region in wanted]
    assert sizes == [4096, 4096, 904]


Answer = Callable[[ChecksumsRequest], ChecksumsAnswer | None]


def truth_of(held: WeightArena) -> Answer:
    """What a seed answers that computes the checksums in these weights."""
    checksums = RegionChecksums(held)

    def answer(request: ChecksumsRequest) -> ChecksumsAnswer:
        regions = [one if isinstance(one, WeightRegion) else WeightRegion(*one) for one in request.regions]
        return ChecksumsAnswer(algorithm=checksums.algorithm, checksums=checksums.compute(regions))

    return answer


def silent(_request: ChecksumsRequest) -> ChecksumsAnswer | None:
    raise WeightTransferError("verify", 0, "silent", "it does not answer")


def of_another_kind(request: ChecksumsRequest) -> ChecksumsAnswer:
    return ChecksumsAnswer(algorithm="another", checksums=["0"] * len(request.regions))


class Asked:
    """Seeds that answer with these functions, in order, and who was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, arena: WeightArena, *answers: Answer) -> None:
        self.arena = arena
        self.names: list[str] = []
        seeds = [FakeSeed(port, arena) for port in range(1, len(answers) + 1)]
        self._by_name = {seed.name: answer for seed, answer in zip(seeds, answers, strict=True)}
        self._instances = [seed.instance(arena.manifest) for seed in seeds]
        monkeypatch.setattr(verification, "fetch_checksums", self._fetch)

    def _fetch(self, server: SeedServer, request: ChecksumsRequest, *_: Any) -> ChecksumsAnswer | None:
        self.names.append(server.name)
        return self._by_name[server.name](request)

    def verify(self) -> bool:
        entries = self.arena.manifest.entries[4:8]
        return verify_by_regions(self.arena, entries, self._instances, LoadConfig())


def test_pieces_that_agree_are_verified_by_one_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    truth = truth_of(toy_arena(fill=1))
    asked = Asked(monkeypatch, toy_arena(fill=1), truth, truth)
    assert asked.verify() and asked.names == ["10.0.0.1:1"]


def test_pieces_that_differ_name_their_tensor_and_no_other_seed_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    arena = toy_arena(fill=1)
    spoil(arena, "w5")
    spoil(arena, "w9")  # not asked for
    asked = Asked(monkeypatch, arena, truth_of(toy_arena(fill=1)), truth_of(arena))
    with pytest.raises(ChecksumMismatch) as mismatch:
        asked.verify()
    assert [entry.name for entry in mismatch.value.entries] == ["w5"] and asked.names == ["10.0.0.1:1"]


@pytest.mark.parametrize("answer", [lambda _: None, of_another_kind], ids=["can't tell", "another algorithm"])
def test_a_seed_that_can_not_tell_leaves_it_unverified(monkeypatch: pytest.MonkeyPatch, answer: Answer) -> None:
    assert not Asked(monkeypatch, toy_arena(fill=1), answer).verify()


def test_a_seed_that_does_not_answer_is_got_past(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked(monkeypatch, toy_arena(fill=1), silent, truth_of(toy_arena(fill=1)))
    assert asked.verify() and asked.names == ["10.0.0.1:1", "10.0.0.1:2"]


def test_when_none_answers_that_is_an_error_and_no_mismatch(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked(monkeypatch, toy_arena(fill=1), silent, silent)
    with pytest.raises(WeightTransferError, match="it does not answer.*it does not answer") as error:
        asked.verify()
    assert not isinstance(error.value, ChecksumMismatch)
