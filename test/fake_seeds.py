"""Owns seeds that are no processes: what they hold, how they fail, and who was asked for what. It imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import seed_process
from ramet.srt.configs.load_config import LoadConfig
from ramet.srt.model_loader.arena.allocate import allocate_arena
from ramet.srt.model_loader.arena.base import WeightArena
from ramet.srt.model_loader.checksums.entries import compute_checksums, with_checksums
from ramet.srt.model_loader.client.seed_instance import SeedInstance, SeedRank
from ramet.srt.utils.net import SeedAddress
from ramet.srt.weights.copy_op import CopyOp
from ramet.srt.weights.errors import WeightTransferError
from ramet.srt.weights.manifest import WeightManifest
from ramet.srt.weights.planner import ArenaSource
from ramet.srt.weights.registration import SeedAnswer

TOY: dict[str, Any] = seed_process.DEFAULTS | {"shapes": {f"w{index}": [256] for index in range(32)}}  # of 1 kB each


def toy_arena(fill: int | None = None, **changes: Any) -> WeightArena:
    """An arena of the toy model: empty, or with the numbers of that `fill`."""
    config = TOY | changes
    arena = allocate_arena(seed_process.make_manifest(config), "cpu")
    if fill is not None:
        seed_process.fill_arena(arena, seed_process.make_tensors(config | {"fill": fill}))
    return arena


def toy_tensors(fill: int) -> dict[str, Any]:
    return seed_process.make_tensors(TOY | {"fill": fill})


@dataclass
class FakeSeed:
    """A seed of one rank with the client's layout.

    Attributes:
        held: its weights. Their checksums are what it announces.
        error: raised by the step behind the first `num_good` ones; None for a seed that gives everything.
        lies_at: place in the arena of a byte that it sends wrong.
        can_be_opened: whether its transport starts.
    """

    port: int
    held: WeightArena
    error: Exception | None = None
    num_good: int = 0
    lies_at: int | None = None
    can_be_opened: bool = True
    is_local: bool = False
    has_checksums: bool = True
    asked: list[list[CopyOp]] = field(default_factory=list)  # in each round

    @property
    def name(self) -> str:
        return f"10.0.0.1:{self.port}"

    def instance(self, manifest: WeightManifest) -> SeedInstance:
        """As a client knows it that has asked it."""
        theirs = self.held.manifest
        if self.has_checksums:
            theirs = with_checksums(theirs, compute_checksums(theirs, self.held))
        instance = SeedInstance(SeedAddress("10.0.0.1", self.port), LoadConfig(), manifest)
        answer = SeedAnswer(rank=0, remote_instance_transfer_engine_info=("a:1", {}), manifest=theirs)
        source = ArenaSource(f"rank 0 of the seed {self.name}", theirs)
        instance.ranks.append(SeedRank(instance.server, answer, self.is_local, source))
        return instance

    def asked_for(self, a_round: int) -> list[tuple[int, int]]:
        """The ranges of the arena that it was asked for in a round, in order."""
        return sorted((op.target_offset, op.target_stop) for op in self.asked[a_round])


class FakeSource:
    """One seed's rank, by a way that fails as the seed says."""

    name = "fake"
    measured_seconds = 0.0

    def __init__(self, seed: FakeSeed, arena: WeightArena) -> None:
        self._seed = seed
        self._arena = arena
        self._num_steps = 0

    def make_steps(self, ops: Sequence[CopyOp]) -> list[list[CopyOp]]:
        self._seed.asked.append(list(ops))
        return [[op] for op in ops]

    def run(self, step: list[CopyOp], /) -> None:
        seed = self._seed
        if seed.error is not None and self._num_steps == seed.num_good:
            raise seed.error
        self._num_steps += 1
        for op in step:
            sent = bytearray(seed.held.memory[op.source_offset : op.source_offset + op.row_nbytes])
            if seed.lies_at is not None and op.target_offset <= seed.lies_at < op.target_stop:
                sent[seed.lies_at - op.target_offset] ^= 1
            self._arena.memory[op.target_offset : op.target_stop] = sent


class FakeOpener:
    """The sources of one round.

    Args:
        is_safe: whether the arena is safe from late writes once sources are abandoned.
    """

    def __init__(self, seeds: Sequence[FakeSeed], arena: WeightArena, ends: list[str], is_safe: bool = True) -> None:
        self._seeds = {seed.name: seed for seed in seeds}
        self._arena = arena
        self._ends = ends
        self._is_safe = is_safe

    def open(self, rank: SeedRank) -> FakeSource:
        seed = self._seeds[rank.seed]
        if not seed.can_be_opened:
            raise WeightTransferError("transfer", 0, seed.name, "its transport does not start")
        return FakeSource(seed, self._arena)

    def close(self) -> None:
        self._ends.append("closed")

    def abandon(self) -> bool:
        self._ends.append("abandoned")
        return self._is_safe
