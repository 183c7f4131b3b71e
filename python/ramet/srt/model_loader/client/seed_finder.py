"""Owns what a loader knows of who finds seeds for it: candidates one after the other, and why there are no more."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, TypeVar

from ramet.srt.model_loader.client.seed_instance import SeedInstance
from ramet.srt.weights.errors import WeightTransferError
from ramet.srt.weights.manifest import WeightManifest
from ramet.srt.weights.report import Claim


@dataclass(frozen=True)
class FoundSeeds:
    """Seed instances that have said what they have, and that share one transfer."""

    name: str  # as logs and errors call them
    instances: Sequence[SeedInstance]
    # What a report calls world ranks of the seed that a metadata server lists; others go by their seed's address.
    worker_ids: Mapping[int, str] = field(default_factory=dict)


C = TypeVar("C")


class SeedFinder(Protocol[C]):
    """One search for seeds that have the weights of one rank. It may be used once."""

    @property
    def origin(self) -> str:
        """From whom no weights came if all candidates failed, as the log says it."""
        ...

    @property
    def claim(self) -> Claim | None:
        """To be kept until others can take the weights from here; None if nobody is kept from reading the files."""
        ...

    def candidates(self) -> Iterator[C]:
        """What to try, the best first, for as long as it makes sense. One that failed must be told by `give_up`."""
        ...

    def open(self, candidate: C) -> FoundSeeds:
        """Ask the candidate's seeds what they have.

        Raises:
            WeightTransferError: if none of them has what is needed.
        """
        ...

    def give_up(self, candidate: C, error: WeightTransferError) -> None:
        """The candidate could not be opened, or could not give the weights."""
        ...

    def shortage(self) -> WeightTransferError | None:
        """After the last candidate: why there was no other, where that is worth saying."""
        ...

    def close(self) -> None:
        """End the search. The claim lives on."""
        ...


# Makes the search for one load, from what the rank needs and its model folder.
FinderMaker: TypeAlias = Callable[[WeightManifest, str], SeedFinder[Any]]
