"""One rank's weights on their way from an arena to other instances and back, with stand-ins for those."""

from typing import Any

import pytest
import torch
import toy_model
from ramet.srt.configs.load_config import LoadConfig, LoadContext
from ramet.srt.configs.runner_config import WeightsConfig
from ramet.srt.model_executor import rank_weights
from ramet.srt.model_executor.rank_weights import LoadedWeights, RankWeights
from ramet.srt.model_loader.arena.allocate import allocate_arena
from ramet.srt.modelexpress.client import publication
from ramet.srt.weights.report import LoadReport, PublisherStats

URL = "http://127.0.0.1:6789"


class Recorder:
    """Stands in for a seed and for a publication: notes what it is told, in one list for all."""

    def __init__(self, events: list[str], what: str) -> None:
        self.events, self.what = events, what
        self.registration = f"registration of {what}"
        self.num_given_bytes = 0

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: self.events.append(f"{self.what}.{name}")

    def rename(self, version: str) -> None:
        self.events.append(f"{self.what}.rename {version}")

    def stats(self) -> PublisherStats:
        return PublisherStats(status="INITIALIZING")


@pytest.fixture
def events() -> list[str]:
    return []


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, events: list[str]) -> dict[str, dict[str, Any]]:
    """What the seed and the publication were made of; the newest ones."""
    made: dict[str, dict[str, Any]] = {}

    class Seed(Recorder):
        @classmethod
        def start(cls, manifest: Any, _arena: Any, **fields: Any) -> "Seed":
            made["seed"] = fields | {"manifest": manifest}
            events.append("seed.start")
            return cls(events, "seed")

        def register(self, url: str, *, admin_api_key: str, timeout_s: float, ca_certs: str | None) -> None:
            events.append(f"seed.register {url} {admin_api_key} {ca_certs}")

        @staticmethod
        def prepare(host: str, rank: int, network: str, gpu_id: int) -> None:
            events.append(f"seed.prepare {host} {rank} {network} {gpu_id}")

    def publish(_config: Any, registration: Any, facts: Any, **fields: Any) -> Recorder:
        made["publication"] = fields | {"registration": registration, "facts": facts}
        return Recorder(events, "publication")

    monkeypatch.setattr(rank_weights, "WeightSeed", Seed)
    monkeypatch.setattr(publication, "Publication", publish)
    return made


def arriving(is_seed: bool = True) -> RankWeights:
    manifest = toy_model.make_manifest(toy_model.make_model())
    config = WeightsConfig(
        name="toy",
        load=LoadConfig(load_format="dummy", ssl_ca_certs="authorities.pem"),
        is_seed=is_seed,
        host="10.0.0.7",
        control_host=None,
        admin_api_key="admin",
        is_published=True,
    )
    context = LoadContext(instance_url="http://10.0.0.7:30000", started_at=5.0)
    return RankWeights(config, context, manifest, allocate_arena(manifest, "cpu"), torch.device("cpu"))


@pytest.mark.parametrize(("is_seed", "expected"), [(True, ["seed.prepare 10.0.0.7 0 required -1"]), (False, [])])
def test_an_offer_is_prepared_while_the_weights_arrive(
    made: Any, events: list[str], is_seed: bool, expected: Any
) -> None:
    arriving(is_seed).prepare_offer()
    assert events == expected


def test_loaded_weights_are_nobody_elses(made: Any, events: list[str], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    loaded = arriving().load("")
    lines = [record.message for record in caplog.records if "loaded" in record.message]
    assert len(lines) == 1 and lines[0].startswith("rank 0: loaded target weights from dummy: ")
    assert loaded.report.source == "dummy" and loaded.report.num_bytes > 0
    assert loaded.publisher_stats() is None
    loaded.close()
    assert events == []


def test_the_claim_to_the_files_ends_with_weights_that_nobody_can_take(events: list[str]) -> None:
    loaded = arriving().load("")
    LoadedWeights(loaded.weights, loaded.report, Recorder(events, "claim")).close()
    assert events == ["claim.release"]


def test_an_offer_is_registered_published_and_withdrawn(made: dict[str, dict[str, Any]], events: list[str]) -> None:
    """In this order: those who look for weights never find an address where they aren't offered."""
    arrived = arriving().load("")
    loaded = LoadedWeights(arrived.weights, arrived.report, Recorder(events, "claim"))
    offered = loaded.offer(lambda: 0.5)
    assert made["seed"]["host"] == "10.0.0.7" and made["seed"]["started_at"] == 5.0
    made["seed"]["on_state"](True)  # nobody knows of the weights yet: there is nothing to say
    assert offered.publisher_stats() is None
    offered.register(URL)
    offered.publish_modelexpress()
    told = made["publication"]
    assert told["registration"] == "registration of seed" and told["claim"] is loaded.claim
    assert told["load_probe"]() == 0.5 and told["facts"].load.source == "dummy"
    assert offered.publisher_stats().status == "INITIALIZING"
    made["seed"]["on_state"](True)
    made["seed"]["on_state"](False)
    assert offered.withdraw() is loaded
    assert events == [
        "seed.start",
        f"seed.register {URL} admin authorities.pem",
        "publication.set_ready",
        "publication.withdraw",
        "publication.close",
        "seed.close",
    ]


def test_withdrawn_weights_can_be_offered_again(made: dict[str, dict[str, Any]], events: list[str]) -> None:
    offered = arriving().load("").offer(lambda: None)
    offered.publish_modelexpress()
    again = offered.withdraw().offer(lambda: None)
    assert again.publisher_stats() is None
    again.publish_modelexpress()
    events.clear()
    again.close()
    assert events == ["publication.close", "seed.close"]


def test_weights_are_renamed_for_everybody_who_looks_for_them(
    made: dict[str, dict[str, Any]], events: list[str]
) -> None:
    offered = arriving().load("").offer(lambda: None)
    assert offered.version == made["seed"]["manifest"].weight_version == "default"
    offered.register(URL)
    offered.publish_modelexpress()
    assert made["publication"]["facts"].weight_version == "default"
    events.clear()
    made["seed"]["on_rename"]("v2")
    registered = f"seed.register {URL} admin authorities.pem"
    assert events == ["seed.rename v2", registered, "publication.rename v2"]
    assert offered.version == "v2"
    again = offered.withdraw().offer(lambda: None)
    assert again.version == made["seed"]["manifest"].weight_version == "v2"
    again.publish_modelexpress()
    assert made["publication"]["facts"].weight_version == "v2"


def test_what_came_from_a_seed_bears_its_version(made: dict[str, dict[str, Any]]) -> None:
    weights = arriving()
    loaded = LoadedWeights(weights, LoadReport(source="nccl", num_bytes=1, seconds=1.0, weight_version="v3"), None)
    assert loaded.version == "v3" and loaded.offer(lambda: None).version == "v3"
    assert made["seed"]["manifest"].weight_version == "v3"


def test_changed_weights_are_withdrawn_and_end_the_process(
    made: dict[str, dict[str, Any]],
    events: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In this order: nobody takes them while the process ends."""
    monkeypatch.setattr(rank_weights.os, "_exit", lambda code: events.append(f"exit {code}"))
    monkeypatch.setattr(rank_weights.logging, "shutdown", lambda: None)
    offered = arriving().load("").offer(lambda: 0.5)
    assert made["seed"]["network"] == "required" and made["seed"]["check_interval_s"] == 0.0
    offered.publish_modelexpress()
    del events[:]
    made["seed"]["on_change"]("the weights have changed: a")
    assert events == ["publication.withdraw", "exit 72"]
    assert caplog.messages[-1] == "the weights have changed: a; the instance can't go on"
