"""Owns which content checksums an arena has, and which it must have by what a seed says. Knows no transport."""

import msgspec

from ramet.srt.model_loader.arena.base import WeightArena
from ramet.srt.weights.manifest import WeightChecksums, WeightManifest


def compute_checksums(manifest: WeightManifest, arena: WeightArena) -> WeightChecksums:
    """Checksums of every entry of the arena, by its device's algorithm."""
    return WeightChecksums(
        algorithm=arena.checksum_algorithm,
        values=arena.hash_entries(manifest.entries),
        samples=arena.hash_samples(manifest.entries),
    )


def with_checksums(manifest: WeightManifest, checksums: WeightChecksums) -> WeightManifest:
    return msgspec.structs.replace(manifest, checksums=checksums)
