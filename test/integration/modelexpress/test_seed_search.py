"""Which sources a rank tries, what it leaves out, and what the ranks of one instance tell each other."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest
from modelexpress_harness import free_port, make_manifest, open_client
from ramet.srt.configs.load_config import LoadConfig
from ramet.srt.modelexpress.ages import wall_clock_ms
from ramet.srt.modelexpress.client.publisher import INITIALIZING, READY
from ramet.srt.modelexpress.client.seed_info import InfoAddress, make_info_url
from ramet.srt.modelexpress.client.seed_search import SeedSearch
from ramet.srt.modelexpress.proto import p2p_pb2
from ramet.srt.modelexpress.records import FACTS_KEY, InstanceFacts, build_worker_metadata
from ramet.srt.modelexpress.server.server import ModelExpressServer
from ramet.srt.weights.errors import WeightTransferError

OWN = InstanceFacts(instance="http://127.0.0.1:1", host="here", started_at=50.0)


class BoardOfThreads:
    """A board for ranks that are threads."""

    def __init__(self) -> None:
        self._values: dict[str, str] = {}
        self._changed = threading.Condition()

    def announce(self, key: str, value: str) -> None:
        with self._changed:
            self._values[key] = value
            self._changed.notify_all()

    def await_announcement(self, key: str, timeout_s: float) -> str | None:
        with self._changed:
            self._changed.wait_for(lambda: key in self._values, timeout_s)
            return self._values.get(key)


class Ranks:
    """The searches of an instance of two ranks, and records for them to find."""

    def __init__(self, address: str):
        self.config = LoadConfig(
            modelexpress_url=address, modelexpress_model_name="toy", modelexpress_tp_size=2, modelexpress_wait_s=1.0
        )
        self.manifests = [make_manifest(tp_size=2, tp_rank=rank) for rank in range(2)]
        board = BoardOfThreads()
        self.searches = [
            SeedSearch(self.config, manifest, OWN, board, can_read_files=True) for manifest in self.manifests
        ]

    def publish(self, worker_id: str, rank: int, instance: str, started_at: float = 1.0) -> None:
        port = int(instance.rpartition(":")[2])
        worker = build_worker_metadata(
            self.manifests[rank],
            base_address=0,
            session_id="",
            info_url=make_info_url(InfoAddress("127.0.0.1", port, rank, "target")),
            facts=InstanceFacts(instance=instance, world_rank=rank, started_at=started_at),
        )
        worker.status, worker.updated_at = READY, wall_clock_ms()
        with open_client(self.config.modelexpress_url) as client:
            client.publish(self.searches[0].identity, worker_id, worker)

    def close(self) -> None:
        for search in self.searches:
            if search.claim is not None:
                search.claim.release()
            search.close()


@pytest.fixture
def ranks(server: ModelExpressServer) -> Iterator[Ranks]:
    made = Ranks(server.address)
    yield made
    made.close()


def try_all(search: SeedSearch) -> int:
    """How many candidates there were, of which none gave its weights."""
    count = 0
    for candidate in search.candidates():
        with pytest.raises(WeightTransferError) as failure:
            search.open(candidate)
        search.give_up(candidate, failure.value)
        count += 1
    return count


def test_when_rank_0_gives_up_the_others_do_not_wait(ranks: Ranks) -> None:
    dead = f"http://127.0.0.1:{free_port()}"
    for rank in range(2):
        ranks.publish(f"dead{rank}", rank, dead)
    start = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(try_all, ranks.searches)) == [1, 1]
    assert time.monotonic() - start < 8  # far below the 15 s that a rank waits for its shard
    claim = ranks.searches[0].claim
    assert claim is not None and claim.held
    assert "rank 0 has given up all sources" in ranks.searches[1].reason


def test_what_crashed_predecessors_have_left_is_not_tried(ranks: Ranks) -> None:
    """Neither one at the own address, nor one whose successor is listed too."""
    (search, _), living = ranks.searches, "http://127.0.0.1:2"
    ranks.publish("own-predecessor", 0, OWN.instance, started_at=1.0)
    ranks.publish("predecessor", 0, living, started_at=1.0)
    ranks.publish("successor", 0, living, started_at=2.0)
    candidate = next(search.candidates())
    assert [ref.worker_id for ref in candidate.refs] == ["successor"]
    search.give_up(candidate, WeightTransferError("ask", 0, candidate.name, "it is not there"))
    assert [ref.worker_id for ref in search._look()[0].refs] == ["predecessor"]


def test_the_claim_of_a_crashed_predecessor_does_not_count(ranks: Ranks) -> None:
    claim = ranks.searches[0].claim
    assert claim is not None
    with open_client(ranks.config.modelexpress_url) as client:
        for number, (started_at, holds) in enumerate([(OWN.started_at - 1, True), (OWN.started_at, False)]):
            facts = msgspec.structs.replace(OWN, started_at=started_at)
            worker = p2p_pb2.WorkerMetadata(topology={FACTS_KEY: msgspec.json.encode(facts).decode()})
            worker.status, worker.updated_at = INITIALIZING, wall_clock_ms()
            client.publish(claim._identity, f"0{number}", worker)
            assert claim.try_acquire(client) == holds
            claim.release()
