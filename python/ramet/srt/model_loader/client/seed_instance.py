"""Owns what a client's rank learns of one seed instance: which ranks it has, and which of them hold what it needs."""

import contextlib
import os
import socket
import time
import zlib
from dataclasses import dataclass

from ramet.srt.configs.load_config import LoadConfig
from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.model_loader.client.upstream_seed import source_from_names
from ramet.srt.model_loader.remote_instance_weight_loader_utils import (
    ABSENT_GRACE_S,
    RankNotRegistered,
    SeedRefused,
    SeedServer,
    fetch_seed_answer,
)
from ramet.srt.utils.net import SeedAddress, host_identity
from ramet.srt.weights.agreement import find_disagreement
from ramet.srt.weights.errors import WeightTransferError
from ramet.srt.weights.manifest import WeightManifest, layout_digest
from ramet.srt.weights.planner import ArenaSource, PlanError, PlanSource, plan
from ramet.srt.weights.registration import SeedAnswer
from ramet.srt.weights.version import DEFAULT_VERSION


@dataclass(frozen=True)
class SeedRank:
    """One rank of a seed instance, as a source for the planner and for whoever executes the plan."""

    server: SeedServer
    answer: SeedAnswer
    is_local: bool  # its memory can be had on this host
    source: PlanSource
    is_peer: bool = False  # it takes the same weights, and gives on what it has

    @property
    def seed(self) -> str:
        """The instance's address."""
        return self.server.name


class SeedInstance:
    """A running instance, asked for as few of its ranks as cover what one rank of a client needs."""

    def __init__(
        self, address: SeedAddress, config: LoadConfig, manifest: WeightManifest, ready_rank: int | None = None
    ) -> None:
        """
        Args:
            manifest: what the client's rank needs.
            ready_rank: a rank that is known to be up; then nothing is waited for, and its replica is preferred.
        """
        self.server = SeedServer(address, config.api_keys, config.ssl_ca_certs, config.shows_keys)
        self.name = address.name
        self.ranks: list[SeedRank] = []
        self._ready_rank = ready_rank
        self._config = config
        self._manifest = manifest
        self._deadline = time.monotonic() + config.timeout_s

    @classmethod
    def of_answer(cls, name: str, answer: SeedAnswer, config: LoadConfig, manifest: WeightManifest) -> "SeedInstance":
        """An instance of which all is known that will ever be.

        Raises:
            WeightTransferError: if it does not have the weights.
        """
        seed = cls(SeedAddress("", 0), config, manifest)
        seed.name = name
        seed._add(answer)
        return seed

    @property
    def is_local(self) -> bool:
        """Whether all that is needed can be had on this host."""
        return bool(self.ranks) and all(rank.is_local for rank in self.ranks)

    @property
    def versions(self) -> set[str]:
        """Of the weights, as each rank that was found has said: one, unless they were just changing."""
        return {rank.answer.manifest.weight_version for rank in self.ranks if rank.answer.manifest is not None}

    def ask_versions(self, timeout_s: float) -> set[str]:
        """The same now, of those ranks that answer soon."""
        versions = set()
        for rank in self.ranks:
            if rank.answer.manifest is not None:
                with contextlib.suppress(WeightTransferError):
                    asked = rank.answer
                    answer = fetch_seed_answer(self.server, asked.rank, asked.role, timeout_s, is_listed=True)
                    versions |= {answer.manifest.weight_version} if answer.manifest is not None else set()
        return versions

    def find_ranks(self) -> None:
        """Ask until `ranks` covers everything: the same rank of a seed of the same sizes, several of another one.

        Raises:
            WeightTransferError: if the seed does not answer in time, lacks a rank, or does not have the weights.
        """
        try:
            first = self._ask_first()
        except SeedRefused:
            if not self._config.send_weights_group_ports:
                raise
            first = None  # as upstream's seeds do that only know broadcasts
        if first is None or first.manifest is None:
            self._add_upstream(first)
            return
        disagreement = find_disagreement(self._manifest, first.manifest)
        if disagreement:
            raise self._error("agree", disagreement)
        own, theirs = self._manifest.parallel, first.manifest.parallel
        shards = theirs.pp_size * theirs.tp_size
        replica = choose_replica(own, theirs.dp_size) if self._ready_rank is None else first.rank // shards
        start = replica * shards
        known = {first.rank: first}
        likely = [start + shard_rank for shard_rank in likely_shard_ranks(own, theirs)]
        self._add_all(likely, known)
        if self._lacking() is None:
            return
        rest = [rank for rank in range(start, start + shards) if rank not in likely]
        self._add_all(rest, known)
        lacking = self._lacking()
        if lacking is not None:
            raise self._error("agree", lacking) from lacking

    def ask_trainer(self) -> SeedAnswer:
        """Ask a rank of a trainer, which is a seed by itself and need not have everything.

        Raises:
            WeightTransferError: if it does not answer in time, or is none.
        """
        answer = self._ask(0, ABSENT_GRACE_S)
        if answer.published is None or answer.manifest is None:
            raise self._error("agree", "no trainer publishes weights there")
        self._add(answer)
        return answer

    def _ask_first(self) -> SeedAnswer:
        """The answer about some rank, which tells the seed's sizes: the own one, if there is such a rank, else 0."""
        if self._ready_rank is not None:
            return self._ask(self._ready_rank, 0.0)
        rank = self._manifest.parallel.world_rank
        if rank == 0:
            return self._ask(0, ABSENT_GRACE_S)
        try:
            return self._ask(rank, 0.0)
        except RankNotRegistered as missing:
            first = self._ask(0, ABSENT_GRACE_S)
            if first.manifest is None:
                raise self._error("agree", f"it sends no manifest, so it must have the same ranks: {missing.cause}") \
                    from missing  # fmt: skip
            return first

    def _add_all(self, ranks: list[int], known: dict[int, SeedAnswer]) -> None:
        for rank in ranks:
            # A rank that must be there is worth the whole time.
            self._add(known.get(rank) or self._ask(rank, self._config.timeout_s))

    def _ask(self, rank: int, absent_grace_s: float) -> SeedAnswer:
        left = max(0.001, self._deadline - time.monotonic())
        return fetch_seed_answer(
            self.server,
            rank,
            self._manifest.role,
            left,
            min(absent_grace_s, left),
            is_listed=self._ready_rank is not None,
        )

    def _add_upstream(self, answer: SeedAnswer | None) -> None:
        """A seed without a manifest. One that sends broadcasts must have the same parameters: it does not say."""
        if self._config.backend != "nccl":
            assert answer is not None
            self._add(answer)
            return
        if not self._config.send_weights_group_ports:
            raise self._error("agree", "it sends no manifest: it needs --remote-instance-weight-loader-send-weights-"
                              "group-ports with a port for each rank")  # fmt: skip
        self._check_takes_any_version()
        rank = self._manifest.parallel.world_rank
        answer = SeedAnswer(rank=rank, remote_instance_transfer_engine_info=("", {}), role=self._manifest.role)
        source = ArenaSource(f"the seed {self.name}", self._manifest)
        self.ranks.append(SeedRank(self.server, answer, False, source))

    def _add(self, answer: SeedAnswer) -> None:
        name = f"rank {answer.rank} of the seed {self.name}"
        source: PlanSource
        if answer.manifest is not None:
            source = ArenaSource(name, answer.manifest)
        else:
            self._check_takes_any_version()
            try:
                source = source_from_names(name, answer, self._manifest)
            except PlanError as error:
                raise self._error("agree", error) from error
        self.ranks.append(SeedRank(self.server, answer, self._is_local(answer), source))

    def _check_takes_any_version(self) -> None:
        """Raises WeightTransferError if a version is wanted, and the seed does not say which one it has."""
        if self._manifest.weight_version != DEFAULT_VERSION:
            raise self._error("agree", f"it does not say its weight version, which must be "
                              f"{self._manifest.weight_version}")  # fmt: skip

    def _is_local(self, answer: SeedAnswer) -> bool:
        if self._config.local_mode == "off" or answer.local_handle is None or answer.manifest is None:
            return False
        return answer.local_handle.host_identity == host_identity()

    def _lacking(self) -> PlanError | None:
        """Why the ranks found so far are not enough."""
        own_layout = layout_digest(self._manifest)
        if own_layout in [rank.source.layout for rank in self.ranks]:
            return None
        try:
            plan(self._manifest, [rank.source for rank in self.ranks])
        except PlanError as error:
            if error.mismatches:
                raise self._error("agree", error) from error
            return error
        return None

    def _error(self, stage: str, cause: object) -> WeightTransferError:
        return WeightTransferError(stage, self._manifest.parallel.world_rank, self.name, cause)


def choose_replica(own: ParallelConfig, num_replicas: int) -> int:
    """Which of a seed's data-parallel replicas this rank takes: the ranks of a client, and clients, take turns."""
    launcher = zlib.crc32(f"{socket.gethostname()} {os.getppid()}".encode())
    return (launcher + own.dp_rank + own.shard_rank) % num_replicas


def likely_shard_ranks(own: ParallelConfig, theirs: ParallelConfig) -> list[int]:
    """The seed's shard ranks whose share of layers, rows and experts overlaps this rank's.

    A guess that saves asking for the others: padding and replicated heads can make a share a little different.
    """
    stages = [stage for stage in range(theirs.pp_size) if _overlaps(own.pp_rank, own.pp_size, stage, theirs.pp_size)]
    share = theirs.moe_tp_size
    columns = [
        rank
        for rank in range(theirs.tp_size)
        if _overlaps(own.tp_rank, own.tp_size, rank, theirs.tp_size)
        or _overlaps(own.ep_rank, own.ep_size, rank // share, theirs.ep_size)
        and _overlaps(own.moe_tp_rank, own.moe_tp_size, rank % share, share)
        and max(own.ep_size, theirs.ep_size) > 1
    ]
    return [stage * theirs.tp_size + column for stage in stages for column in columns]


def _overlaps(part: int, num_parts: int, other: int, num_others: int) -> bool:
    """Whether two of equal parts of one whole overlap."""
    return part * num_others < (other + 1) * num_parts and other * num_parts < (part + 1) * num_others
