"""Owns the comparison of a filled arena with what its seeds say of their weights. Moves and repairs nothing."""

from collections.abc import Sequence

from ramet.srt.configs.load_config import LoadConfig
from ramet.srt.model_loader.arena.base import WeightArena
from ramet.srt.model_loader.checksums.regions import RegionChecksums, split_over_ranks
from ramet.srt.model_loader.client.seed_instance import SeedInstance
from ramet.srt.model_loader.client.transfer import combine_errors
from ramet.srt.model_loader.remote_instance_weight_loader_utils import fetch_checksums
from ramet.srt.utils.threads import num_copy_threads
from ramet.srt.weights.errors import WeightTransferError, name_some
from ramet.srt.weights.manifest import WeightChecksums, WeightEntry, WeightManifest, content_checksums, content_key
from ramet.srt.weights.registration import ChecksumsRequest


class OtherWeights(WeightTransferError):
    """A seed gave weights that are not what they should be."""


class ChecksumMismatch(OtherWeights):
    """Tensors do not hold what the seeds say.

    Attributes:
        entries: the tensors.
    """

    def __init__(self, rank: int, seed: str, entries: Sequence[WeightEntry], digest: str = "") -> None:
        """
        Args:
            digest: of the checkpoint whose content they don't hold; "" where checksums of the seed's differ.
        """
        names = name_some([entry.name for entry in entries])
        what = f"the checksums of {len(entries)} tensors differ from the seed's: {names}"
        if digest:
            what = f"it has other weights: {len(entries)} tensors are not those of the digest {digest}: {names}"
        super().__init__("verify", rank, seed, what)
        self.entries = list(entries)


def verify_by_entries(
    arena: WeightArena, manifests: Sequence[WeightManifest], seed: str, *, samples_only: bool = False
) -> list[WeightEntry]:
    """Compare the tensors that some seed has just so, slice for slice, with the checksums in its manifest.

    Once all have been compared, the arena knows its checksums.

    Returns:
        The tensors that no seed has so.

    Raises:
        ChecksumMismatch: if one differs.
    """
    manifest = arena.manifest
    values = _merge(arena, manifests, samples_only=False)
    samples = _merge(arena, manifests, samples_only=True)
    expected = samples if samples_only else values
    wrong = set(find_mismatches(manifest, arena, expected, samples_only=samples_only))
    if wrong:
        raise ChecksumMismatch(
            manifest.parallel.world_rank, seed, [entry for entry in manifest.entries if entry.name in wrong]
        )
    rest = [entry for entry in manifest.entries if entry.name not in expected and entry.nbytes]
    if len(expected) == len(manifest.entries):
        arena.checksums = WeightChecksums(
            algorithm=arena.checksum_algorithm,
            values=tuple(values[entry.name] for entry in manifest.entries),
            samples=tuple(samples[entry.name] for entry in manifest.entries),
        )
    return rest


def _merge(arena: WeightArena, manifests: Sequence[WeightManifest], *, samples_only: bool) -> dict[str, str]:
    merged: dict[str, str] = {}
    for manifest in manifests:
        merged |= expected_checksums(arena, manifest, samples_only=samples_only)
    return merged


def verify_by_regions(
    arena: WeightArena, entries: Sequence[WeightEntry], seeds: Sequence[SeedInstance], config: LoadConfig
) -> bool:
    """Compare slices that lie in pieces on a seed's ranks: the seed computes the checksum of each piece.

    Returns:
        Whether all could be compared; False for seeds that can't do it.

    Raises:
        ChecksumMismatch: if one differs.
        WeightTransferError: if no seed answers.
    """
    rank = arena.manifest.parallel.world_rank
    errors = []
    for seed in seeds:
        try:
            return _compare_regions(arena, entries, seed, config)
        except ChecksumMismatch:
            raise
        except WeightTransferError as error:
            errors.append(error)
    raise combine_errors(rank, errors)


def _compare_regions(
    arena: WeightArena, entries: Sequence[WeightEntry], seed: SeedInstance, config: LoadConfig
) -> bool:
    holdings = [rank.source.holdings for rank in seed.ranks]
    shares = split_over_ranks(entries, holdings)
    own = RegionChecksums(arena)
    wrong: set[str] = set()
    for rank, share in zip(seed.ranks, shares, strict=True):
        if not share:
            continue
        regions = [region for _, region in share]
        request = ChecksumsRequest(rank=rank.answer.rank, role=arena.manifest.role, regions=regions)
        answer = fetch_checksums(rank.server, request, config.timeout_s)
        if answer is None or answer.algorithm != own.algorithm:
            return False
        actual = own.compute(regions, num_copy_threads())
        wrong |= {name for (name, _), a, b in zip(share, actual, answer.checksums, strict=True) if a != b}
    if wrong:
        raise ChecksumMismatch(
            arena.manifest.parallel.world_rank, seed.name, [entry for entry in entries if entry.name in wrong]
        )
    return True


def find_mismatches(
    manifest: WeightManifest, arena: WeightArena, expected: dict[str, str], *, samples_only: bool = False
) -> list[str]:
    """Names of the entries whose content in the arena is not the expected one.

    Args:
        expected: name to checksum (to checksum of the sample, with `samples_only`); entries without one are skipped.
    """
    chosen = [entry for entry in manifest.entries if entry.name in expected]
    actual = arena.hash_samples(chosen) if samples_only else arena.hash_entries(chosen)
    return [entry.name for entry, value in zip(chosen, actual, strict=True) if value != expected[entry.name]]


def expected_checksums(
    arena: WeightArena, seed_manifest: WeightManifest, *, samples_only: bool = False
) -> dict[str, str]:
    """What the seed says that the client's entries must hash to: for those that are made of the same boxes.

    Empty when the seed's checksums are missing or of another algorithm than this arena's.
    """
    known = content_checksums(seed_manifest, samples_only=samples_only)
    wanted = {entry.name: content_key(arena.checksum_algorithm, entry) for entry in arena.manifest.entries}
    return {name: known[key] for name, key in wanted.items() if key in known}
