"""Owns which content checksums an arena has, and which it must have by what a seed says. Knows no transport."""

import msgspec

from ramet.srt.model_loader.arena.base import WeightArena
from ramet.srt.weights.manifest import WeightChecksums, WeightEntry, WeightManifest


def compute_checksums(manifest: WeightManifest, arena: WeightArena) -> WeightChecksums:
    """Checksums of every entry of the arena, by its device's algorithm."""
    return WeightChecksums(
        algorithm=arena.checksum_algorithm,
        values=arena.hash_entries(manifest.entries),
        samples=arena.hash_samples(manifest.entries),
    )


def with_checksums(manifest: WeightManifest, checksums: WeightChecksums) -> WeightManifest:
    return msgspec.structs.replace(manifest, checksums=checksums)


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
    wanted = {entry.name: _content_key(arena.checksum_algorithm, entry) for entry in arena.manifest.entries}
    return {name: known[key] for name, key in wanted.items() if key in known}


def content_checksums(manifest: WeightManifest | None, *, samples_only: bool = False) -> dict[tuple, str]:
    """The checksums in a manifest by what they are of: (algorithm, name, …), which is equal for equal slices."""
    checksums = manifest.checksums if manifest is not None else None
    if manifest is None or checksums is None:
        return {}
    values = checksums.samples if samples_only else checksums.values
    return {
        _content_key(checksums.algorithm, entry): value for entry, value in zip(manifest.entries, values, strict=True)
    }


def _content_key(algorithm: str, entry: WeightEntry) -> tuple:
    return algorithm, entry.name, entry.dtype, entry.shape, entry.boxes
