"""A digest that weights must have: who holds others is refused in every topology, whatever it says of itself."""

import logging
import re
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
import seed_process
from loading_client import LoadingClient
from modelexpress_harness import running_server
from ramet.srt.model_loader.arena.base import WeightArena
from ramet.srt.model_loader.checkpoint import source
from ramet.srt.model_loader.checkpoint.checkpoint_loader import DefaultModelLoader
from ramet.srt.model_loader.checkpoint.digest_store import compute_table
from ramet.srt.model_loader.client import digest_check
from ramet.srt.modelexpress.client import seed_search
from ramet.srt.weights.content_digest import DigestTable
from ramet.srt.weights.errors import WeightTransferError
from safetensors.numpy import load_file, save_file
from seed_process import SeedProcess
from seed_server import SeedServer, load_all, take, write_random_model

DENSE: list[tuple[dict[str, int], dict[str, int]]] = [({}, {}), ({"tp_size": 2}, {}), ({"tp_size": 2}, {"tp_size": 4})]
EXPERTS: list[tuple[dict[str, int], dict[str, int]]] = [({"tp_size": 2, "ep_size": 2}, {}), ({}, {"tp_size": 4})]


def alter(folder: Path, target: Path) -> Path:
    """A copy of a model, one of whose matrices differs in one byte."""
    shutil.copytree(folder, target)
    shard = next(target.glob("*.safetensors"))
    tensors = load_file(shard)
    name = next(name for name in sorted(tensors) if "down_proj" in name)
    tensors[name].reshape(-1).view("uint8")[7] ^= 1
    save_file(tensors, shard)
    return target


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, DigestTable]:
    """A model, the same with one byte altered, and the table of the first."""
    base = tmp_path_factory.mktemp("dense")
    folder = write_random_model(base / "m", "llama3", num_hidden_layers=2)
    return folder, alter(folder, base / "altered"), compute_table(str(folder))


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, DigestTable]:
    base = tmp_path_factory.mktemp("experts")
    folder = write_random_model(base / "m", "qwen3_moe", num_experts=8, num_hidden_layers=2)
    return folder, alter(folder, base / "altered"), compute_table(str(folder))


def pretending(arenas: list[WeightArena], table: DigestTable) -> list[WeightArena]:
    """Arenas whose seeds say that they hold what `table` is of, with that table to prove it."""
    for arena in arenas:
        arena.content_digest = table
    return arenas


def check_pair(model: tuple[Path, Path, DigestTable], seed_sizes: dict[str, int], client_sizes: dict[str, int]) -> None:
    folder, altered, table = model
    clients = load_all(folder, client_sizes)
    with SeedServer(load_all(folder, seed_sizes)) as good:
        for expected in clients:
            for mode in ("off", "auto"):
                arena, report = take(expected.manifest, good, local_mode=mode, weights_digest=table.digest)
                assert arena.memory == expected.memory and report.digest == table.digest
                assert report.source != "local_map", "memory that its maker could still change"
                assert arena.content_digest == table, "so that it can be a seed for others that insist"
    with SeedServer(pretending(load_all(altered, seed_sizes), table)) as liar:
        outcomes = []
        for expected in clients:
            try:
                arena, _ = take(expected.manifest, liar, local_mode="copy", weights_digest=table.digest)
                outcomes.append("taken")
                assert arena.memory == expected.memory, "a shard that the altered byte is not in"
            except WeightTransferError as error:
                outcomes.append("refused")
                assert re.search(f"not those of the digest {table.digest}: .*(down_proj|w2_weight)", str(error))
        assert "refused" in outcomes
        arena, report = take(clients[0].manifest, liar, local_mode="copy")
        assert report.verified and report.digest == "", "nobody insisted: checksums only tell that bytes arrived"


@pytest.mark.parametrize("pair", DENSE)
def test_one_altered_byte_is_found_in_every_topology(model: Any, pair: Any) -> None:
    check_pair(model, *pair)


@pytest.mark.parametrize("pair", EXPERTS)
def test_one_altered_byte_of_an_expert_is_found(experts: Any, pair: Any) -> None:
    check_pair(experts, *pair)


def test_an_honest_seed_gives_what_the_liar_gave(model: Any) -> None:
    """Two seeds share the work: what the one has sent comes again from the other."""
    folder, altered, table = model
    (expected,) = load_all(folder, {})
    bad = pretending(load_all(altered, {"tp_size": 2}), table)
    with SeedServer(bad) as liar, SeedServer(load_all(folder, {"tp_size": 2})) as honest:
        arena, report = take(expected.manifest, liar, honest, local_mode="copy", weights_digest=table.digest)
    assert arena.memory == expected.memory and report.digest == table.digest
    assert report.taken_from == (f"127.0.0.1:{honest.port}",)


def test_who_says_that_it_has_others_or_has_no_table_is_not_read_from(model: Any) -> None:
    folder, altered, table = model
    (expected,) = load_all(folder, {})
    options = {"local_mode": "copy", "weights_digest": table.digest}
    other = load_all(altered, {})
    other[0].content_digest = compute_table(str(altered))
    with (
        SeedServer(other) as seed,
        pytest.raises(WeightTransferError, match="it says that its weights have the digest"),
    ):
        take(expected.manifest, seed, **options)
    silent = load_all(altered, {})
    silent[0].content_digest = None
    with SeedServer(silent) as seed, pytest.raises(WeightTransferError, match="no table of hashes"):
        take(expected.manifest, seed, **options)
    with SeedServer(load_all(folder, {}), hidden=["/remote_instance_weights_digest"]) as seed:
        with pytest.raises(WeightTransferError, match="HTTP 404 to /remote_instance_weights_digest"):
            take(expected.manifest, seed, **options)
        assert take(expected.manifest, seed, folder=str(folder), **options)[1].digest == table.digest, "own table"


def test_a_table_that_does_not_hash_to_the_digest_is_nobodys_proof(model: Any) -> None:
    folder, altered, table = model
    (expected,) = load_all(folder, {})
    forged = msgspec.structs.replace(compute_table(str(altered)), digest=table.digest)
    arenas = pretending(load_all(altered, {}), forged)
    with SeedServer(arenas) as liar, pytest.raises(WeightTransferError, match="its table of hashes has the digest"):
        take(expected.manifest, liar, local_mode="copy", weights_digest=table.digest)


def test_what_is_quantised_while_it_is_loaded_is_refused_where_a_digest_is_required(model: Any) -> None:
    folder, _, table = model
    (expected,) = load_all(folder, {}, "fp8")
    with SeedServer(load_all(folder, {}, "fp8")) as seed:
        with pytest.raises(WeightTransferError, match="can't be compared with the digest .*float8_e4m3fn here"):
            take(expected.manifest, seed, local_mode="copy", weights_digest=table.digest)
        options = {"fallback": "disk", "folder": str(folder), "weights_digest": table.digest}
        arena, report = take(expected.manifest, seed, **options)
    assert report.source == "checkpoint" and arena.memory == expected.memory


def test_files_are_held_to_the_digest_too(model: Any) -> None:
    folder, altered, table = model
    (expected,) = load_all(folder, {})
    with pytest.raises(ValueError, match=f"have the digest [0-9a-f]{{64}}, not {table.digest} .--weights-digest."):
        DefaultModelLoader(weights_digest=table.digest).load_weights(expected.manifest, expected, str(altered))
    with SeedServer(pretending(load_all(altered, {}), table)) as liar:
        with pytest.raises(ValueError, match=r"none from disk .*--weights-digest"):
            take(expected.manifest, liar, folder=str(altered), fallback="disk", weights_digest=table.digest)
        arena, report = take(expected.manifest, liar, folder=str(folder), fallback="disk", weights_digest="files")
    assert report.source == "checkpoint" and arena.memory == expected.memory


# A fleet: who publishes at a metadata server is nobody that an instance knows.


def write_toy(folder: Path, **changes: Any) -> Path:
    config = seed_process.DEFAULTS | changes
    shapes = config["shapes"]
    arrays = {
        name: tensor.view("float32").reshape(shapes[name]) for name, tensor in seed_process.make_tensors(config).items()
    }
    save_file(arrays, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("local_mode", ["off", "auto"])
@pytest.mark.parametrize("known", ["digest", "samples"])
def test_a_poisoned_replica_is_passed_over_by_who_has_the_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, local_mode: str, known: str
) -> None:
    """Published under the right name, the least busy, its own checksums right: it was taken, "checksums verified"."""
    caplog.set_level(logging.INFO)
    if known == "samples":
        monkeypatch.setattr(digest_check, "MAX_UNASKED_BYTES", 0)
        monkeypatch.setattr(source, "MIN_SAMPLED_BYTES", 4096)
    write_toy(tmp_path)
    with running_server() as server, SeedProcess(fill=2) as poisoned, SeedProcess() as honest:
        client = LoadingClient(server.address, fallback="disk", local_mode=local_mode)
        client.publish(poisoned.port, load=0.0)
        good = client.publish(honest.port, load=0.9)
        report = client.load(tmp_path)
        assert report.taken_from == (good,) and client.holds()
        assert ("content as in" in caplog.text) is False and bool(report.digest) is (known == "digest")
        why = "it has other weights" if known == "digest" else "it has other weights than the files in"
        assert why in caplog.text and "trying the next" in caplog.text
        honest.kill()
        alone = LoadingClient(server.address, fallback="disk", local_mode=local_mode)
        report = alone.load(tmp_path)
        alone.release_claim()
        assert alone.arena.checksums is None, "of the poisoned one: nobody could take these weights by them"
    assert report.source == "checkpoint" and alone.holds()
    assert "it has other weights" in report.fallback_reason


def test_who_publishes_liars_without_end_does_not_keep_an_instance_busy(tmp_path: Path) -> None:
    write_toy(tmp_path)
    with running_server() as server, SeedProcess(fill=2) as poisoned:
        client = LoadingClient(server.address, fallback="disk")
        for _ in range(2 * seed_search.MAX_LIARS):
            client.publish(poisoned.port)
        report = client.load(tmp_path)
        client.release_claim()
    assert report.source == "checkpoint" and client.holds()
    assert report.fallback_reason.count("it has other weights") == seed_search.MAX_LIARS
    assert "8 sources had other weights than they should" in report.fallback_reason


def test_without_files_and_without_a_digest_it_is_said_that_nothing_was_compared(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    with running_server() as server, SeedProcess(fill=2) as poisoned:
        client = LoadingClient(server.address)
        client.publish(poisoned.port)
        assert client.load().digest == ""
    assert "no digest and no files tell whether the seed" in caplog.text
