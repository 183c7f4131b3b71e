"""Owns checksums of slices of checkpoint tensors, which arenas of different topologies can compare. No transport."""

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from ramet.srt.model_loader.arena.base import WeightArena
from ramet.srt.weights.boxes import Region, WeightRegion, contiguous_strides, flatten, region_volume, share_out
from ramet.srt.weights.manifest import WeightEntry, element_size
from ramet.srt.weights.planner import Holding, holdings_of, region_offset

REGIONS_BETWEEN_RESTS = 16
FOUND_BETWEEN_RESTS = 128
REST_S = 0.002
MAX_REMEMBERED = 200_000  # checksums; a few dozen bytes each


class RegionChecksums:
    """Computes the checksums of regions that an arena holds. The arena must not change any more.

    They are over the elements in the row-major order of the checkpoint tensor, by the algorithm of the arena's device.
    """

    def __init__(self, arena: WeightArena) -> None:
        self.algorithm = arena.checksum_algorithm
        self._arena = arena
        self._holdings = holdings_of(arena.manifest)
        self._known: dict[WeightRegion, str] = {}

    def compute(self, regions: Sequence[WeightRegion], num_threads: int = 1) -> list[str]:
        """The checksum of each region; those asked for before are remembered.

        Args:
            num_threads: 1 is this thread, which rests now and then: the process has more urgent work.

        Raises:
            ValueError: if one is not wholly in the arena.
        """
        if num_threads > 1:
            with ThreadPoolExecutor(num_threads, thread_name_prefix="region-checksums") as pool:
                return list(pool.map(self._compute_one, regions))
        return [self._compute_one(wanted) for wanted in _with_rests(regions, REGIONS_BETWEEN_RESTS)]

    def check_size(self, regions: Sequence[WeightRegion]) -> None:
        """Raises ValueError if a region is not wholly in the arena, or all together are much larger than it. Rests."""
        holdings = [self._find(wanted) for wanted in _with_rests(regions, FOUND_BETWEEN_RESTS)]
        num_bytes = sum(
            region_volume(wanted.region) * element_size(holding.dtype)
            for wanted, holding in zip(regions, holdings, strict=True)
        )
        if num_bytes > 2 * self._arena.manifest.arena_nbytes:  # a client may have a tensor in two places
            raise ValueError(f"the slices have {num_bytes} bytes together, more than twice this rank's weights")

    def _compute_one(self, wanted: WeightRegion) -> str:
        found = self._known.get(wanted)
        if found is None:
            found = hash_region(self._arena, self._find(wanted), wanted.region)
            if len(self._known) < MAX_REMEMBERED:
                self._known[wanted] = found
        return found

    def _find(self, wanted: WeightRegion) -> Holding:
        for holding in self._holdings.get(wanted.checkpoint_name, ()):
            if len(holding.region) == len(wanted.region) and _contains(holding.region, wanted.region):
                return holding
        raise ValueError(f"{wanted.checkpoint_name}{list(wanted.region)} is not in this rank's weights")


def _with_rests(regions: Sequence[WeightRegion], num_between: int) -> Iterator[WeightRegion]:
    """The regions, with a rest before each `num_between` of them, in which other threads have Python's lock."""
    for number, region in enumerate(regions):
        if number % num_between == 0:
            time.sleep(REST_S)
        yield region


def split_over_ranks(
    entries: Sequence[WeightEntry], ranks: Sequence[Mapping[str, Sequence[Holding]]]
) -> list[list[tuple[str, WeightRegion]]]:
    """Which regions of the entries each rank of a seed can speak for: (entry's name, region); none is in two lists.

    Args:
        ranks: holdings of each rank.
    """
    shares: list[list[tuple[str, WeightRegion]]] = [[] for _ in ranks]
    for entry in entries:
        for box in entry.boxes:
            name = box.checkpoint_name
            held = ((share, holding.region) for share, rank in zip(shares, ranks, strict=True)
                    for holding in rank.get(name, ()))  # fmt: skip
            for share, region in share_out(box.source, held)[0]:
                share.append((entry.name, WeightRegion(name, region)))
    return shares


def hash_region(arena: WeightArena, holding: Holding, region: Region) -> str:
    """The checksum of a region that lies inside of a holding of the arena."""
    size = element_size(holding.dtype)
    extents = [stop - start for start, stop in region]
    row, (num_rows, stride, _), repeats = flatten(
        extents, holding.strides, contiguous_strides(extents, size), (size, size)
    )
    start = holding.offset + region_offset(region, holding)
    return arena.hash_rows([start + offset for offset, _ in repeats], row * size, num_rows, stride)


def _contains(outer: Region, inner: Region) -> bool:
    return all(a <= c <= d <= b for (a, b), (c, d) in zip(outer, inner, strict=True))
