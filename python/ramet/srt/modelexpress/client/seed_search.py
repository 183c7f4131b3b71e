"""Owns the way from a model's identity to seeds that a rank can take its weights from, one after the other."""

import dataclasses
import logging
import time
from collections.abc import Iterator

from ramet.srt.configs.load_config import Board, LoadConfig, LoadContext
from ramet.srt.model_loader.client.seed_finder import FoundSeeds
from ramet.srt.model_loader.client.seed_instance import SeedInstance
from ramet.srt.model_loader.client.verification import OtherWeights
from ramet.srt.modelexpress.client.claim import FileClaim
from ramet.srt.modelexpress.client.client import ModelExpressClient, ModelExpressError
from ramet.srt.modelexpress.client.discovery import (
    POLL_S,
    describe_others,
    drop_dead,
    fetch_source,
    find_other_topologies,
    find_sources,
    search,
)
from ramet.srt.modelexpress.client.seed_info import make_seed_answer, read_info_url
from ramet.srt.modelexpress.proto import p2p_pb2
from ramet.srt.modelexpress.records import InstanceFacts, SourceRecord, make_instance_facts, read_facts
from ramet.srt.modelexpress.source_identity import make_source_identity
from ramet.srt.observability.logs import escape_text
from ramet.srt.utils.hub import has_weights
from ramet.srt.weights.errors import WeightTransferError
from ramet.srt.weights.manifest import WeightManifest

logger = logging.getLogger(__name__)

ANSWER_TIMEOUT_S = 5.0  # for a source that is listed as READY: a dead one must be got past in seconds
FOLLOWER_WAIT_S = 15.0  # for a source of a rank's own shard, once one is known for world rank 0's
MAX_NAME_CHARS = 300  # of a source, as its record has it
MAX_LIARS = 8  # then no more are tried: whoever may publish could keep an instance busy for ever
VERDICT_KEY = "modelexpress/verdict"
SURRENDER_KEY = "modelexpress/surrender"  # why world rank 0 reads the files after all, once it has said SOURCES
VERDICT_MARGIN_S = 60.0
SOURCES, FILES = "sources", "files"


@dataclasses.dataclass
class Candidate:
    """An instance that is listed as READY."""

    refs: list[p2p_pb2.SourceInstanceRef]  # the record for this shard rank, or all records of another topology

    @property
    def name(self) -> str:
        facts = read_facts(self.refs[0].topology)
        named = facts is not None and facts.instance
        return escape_text(str(named) if named else f"worker {self.refs[0].worker_id}", MAX_NAME_CHARS)


class SeedSearch:
    """One rank's search, as a SeedFinder: the instances that a metadata server lists are tried one after the other.

    World rank 0 decides for its whole instance whether weights come from other instances or from files, and tells the
    other ranks: if each rank claimed the files for itself, two instances could wait for each other. From which source a
    rank takes its shard, it decides itself. It waits only for a short while then, so no two wait for each other.
    """

    def __init__(
        self,
        config: LoadConfig,
        manifest: WeightManifest,
        facts: InstanceFacts,
        board: Board | None,
        *,
        can_read_files: bool,
    ):
        """
        Args:
            board: None for an instance of one rank.
            can_read_files: whether this instance has files to read if it finds no source.

        Raises:
            ValueError: if a certificate or token file can't be read.
        """
        self.identity = make_source_identity(config, manifest)
        self.client = ModelExpressClient(config.modelexpress_url)
        self.failed: set[str] = set()  # worker ids that were tried in vain
        self.origin = "other instances"
        self.reason = ""  # why no source was found, unless the files were claimed
        self.claim: FileClaim | None = None
        self._own_instance = facts.instance
        self._config = config
        self._manifest = manifest
        self._board = board
        self._shard_rank = manifest.parallel.shard_rank
        self._is_leader = manifest.parallel.world_rank == 0
        self._deadline = time.monotonic() + config.modelexpress_wait_s
        self._announced = False
        self._num_liars = 0  # sources whose weights were not what they should be
        if can_read_files and self._is_leader:
            self.claim = FileClaim(lambda: ModelExpressClient(config.modelexpress_url), self.identity, facts)

    def close(self) -> None:
        """End the search. The claim has connections of its own."""
        self.client.close()

    def shortage(self) -> WeightTransferError | None:
        """After the last candidate: why no source was found, unless the files were claimed."""
        if not self.reason:
            return None
        where = f"the sources at the ModelExpress server {self.client.address}"
        return WeightTransferError("find", self._manifest.parallel.world_rank, where, self.reason)

    def candidates(self) -> Iterator[Candidate]:
        """Instances to try, the best first, for as long as it makes sense. What failed must be told by `give_up`."""
        return self._lead() if self._is_leader else self._follow()

    def give_up(self, candidate: Candidate, error: WeightTransferError) -> None:
        """Don't come back to an instance that could not give its weights."""
        rank = self._manifest.parallel.world_rank
        logger.warning("rank %d: no weights from the source %s, trying the next: %s", rank, candidate.name, error)
        self.failed.update(ref.worker_id for ref in candidate.refs)
        self._num_liars += isinstance(error, OtherWeights)

    def open(self, candidate: Candidate) -> FoundSeeds:
        """Ask the instance itself what it has.

        Raises:
            WeightTransferError: if it does not answer, or does not have what is needed.
        """
        try:
            source = fetch_source(self.client, candidate.refs[0])
        except ModelExpressError as error:
            raise self._error(candidate, error) from error
        if source is None:
            raise self._error(candidate, "it is no longer READY")
        if not source.info_url:
            answer = make_seed_answer(source, self._manifest)
            seed = SeedInstance.of_answer(candidate.name, answer, self._config, self._manifest)
            return FoundSeeds(candidate.name, [seed], {answer.rank: source.worker_id})
        seed = self._ask(candidate, source)
        answers = {rank.answer.rank: rank.answer for rank in seed.ranks}
        records = {facts.world_rank: (facts, ref) for ref in candidate.refs if (facts := read_facts(ref.topology))}
        shared = sorted(set(answers) & set(records))
        for rank in shared:
            real, listed = answers[rank].started_at, records[rank][0].started_at
            if real and listed and real != listed:
                raise self._error(candidate, "the instance that is listed has ended: another one has its address")
        return FoundSeeds(candidate.name, [seed], {rank: records[rank][1].worker_id for rank in shared})

    def _ask(self, candidate: Candidate, source: SourceRecord) -> SeedInstance:
        try:
            address = read_info_url(source.info_url)
        except ValueError as error:
            raise self._error(candidate, error) from error
        timeout_s = min(self._config.timeout_s, ANSWER_TIMEOUT_S)
        # Whoever may publish a record decides who is asked here: nobody's key must be had for that.
        config = dataclasses.replace(self._config, timeout_s=timeout_s, shows_keys=False)
        seed = SeedInstance(address.seed, config, self._manifest, ready_rank=address.rank)
        seed.find_ranks()
        return seed

    def _error(self, candidate: Candidate, cause: object) -> WeightTransferError:
        return WeightTransferError("find", self._manifest.parallel.world_rank, candidate.name, cause)

    def _lead(self) -> Iterator[Candidate]:
        try:
            while True:
                found = self._look()
                for candidate in found:
                    self._announce(SOURCES)
                    yield candidate
                    if self._num_liars >= MAX_LIARS:
                        break
                if self._num_liars >= MAX_LIARS:
                    self.reason = f"{self._num_liars} sources had other weights than they should"
                    break
                if found:
                    continue  # they have failed; others may have come
                outcome = search(
                    self.client,
                    self.identity,
                    self._shard_rank,
                    claim=self.claim,
                    timeout_s=self._wait_s(),
                    failed=self.failed,
                    own_instance=self._own_instance,
                )
                if not outcome.sources:
                    self.reason = outcome.reason
                    self._say_what_else_is_there()
                    break
        except ModelExpressError as error:
            self.reason = str(error)
        if self._board is not None and self._announced:
            self._board.announce(SURRENDER_KEY, self.reason or "no source could give its weights")
        else:
            self._announce(f"{FILES} {self.reason}")

    def _say_what_else_is_there(self) -> None:
        """Before files are read: whether the server lists weights that a user may have meant, and why not these."""
        others = describe_others(self.client, self.identity)
        if others:
            logger.info(
                "rank %d: the ModelExpress server %s lists no ready weights that are surely these; it has %s",
                self._manifest.parallel.world_rank,
                self.client.address,
                others,
            )

    def _wait_s(self) -> float:
        """How long to wait for a source. Ranks that have begun must not wait for each other's record."""
        left = max(0.0, self._deadline - time.monotonic())
        return min(left, FOLLOWER_WAIT_S) if self._announced else left

    def _follow(self) -> Iterator[Candidate]:
        assert self._board is not None, "an instance of several ranks has a board"
        wait_s = self._config.modelexpress_wait_s + VERDICT_MARGIN_S
        verdict = self._board.await_announcement(VERDICT_KEY, wait_s)
        if verdict != SOURCES:
            self.reason = f"rank 0 did not say what it found within {wait_s:g} s" if verdict is None else verdict[6:]
            return
        deadline = time.monotonic() + FOLLOWER_WAIT_S
        while True:
            found = self._look()
            for candidate in found:
                yield candidate
                if self._num_liars >= MAX_LIARS:
                    self.reason = f"{self._num_liars} sources had other weights than they should"
                    return
            if not found:
                if time.monotonic() > deadline:
                    self.reason = f"no source of shard rank {self._shard_rank} became ready in {FOLLOWER_WAIT_S:g} s"
                    return
                surrender = self._board.await_announcement(SURRENDER_KEY, POLL_S)
                if surrender is not None:
                    self.reason = f"rank 0 has given up all sources: {surrender}"
                    return

    def _announce(self, verdict: str) -> None:
        if self._board is not None and not self._announced:
            self._board.announce(VERDICT_KEY, verdict)
            self._announced = True

    def _look(self) -> list[Candidate]:
        """READY instances of the same topology, or else of others; none while the server does not answer."""
        try:
            refs = find_sources(self.client, self.identity, self._shard_rank)
            same = [Candidate([ref]) for ref in drop_dead(refs, self.failed, self._own_instance)]
            return same or self._look_for_other_topologies()
        except ModelExpressError as error:
            logger.debug("no sources are known: %s", error)
            return []

    def _look_for_other_topologies(self) -> list[Candidate]:
        instances: dict[str, Candidate] = {}
        for topology in find_other_topologies(self.client, self.identity):
            for ref in drop_dead(topology.sources, self.failed, self._own_instance):
                facts = read_facts(ref.topology)
                if facts is None or not facts.instance:
                    continue  # no instance answers for it, so there is no manifest to plan with
                instances.setdefault(facts.instance, Candidate([])).refs.append(ref)
        return list(instances.values())


def make_seed_search(config: LoadConfig, context: LoadContext, manifest: WeightManifest, model_path: str) -> SeedSearch:
    """The search for one load of one rank.

    Args:
        model_path: the model's folder.

    Raises:
        ValueError: if a certificate or token file can't be read.
    """
    facts = make_instance_facts(context.instance_url, context.started_at, manifest)
    can_read_files = config.fallback == "disk" and has_weights(config.model_path or model_path)
    return SeedSearch(config, manifest, facts, context.board, can_read_files=can_read_files)
