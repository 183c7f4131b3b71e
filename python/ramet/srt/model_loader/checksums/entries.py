"""Owns the content checksums of an arena: computing them where it lies and comparing them. Knows no transport."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import msgspec
import xxhash

from ramet.srt.model_loader.arena.base import WeightArena
from ramet.srt.utils.threads import num_copy_threads
from ramet.srt.weights.manifest import WeightChecksums, WeightEntry, WeightManifest

SAMPLE_BYTES = 4096  # of each of the first, middle and last block of an entry


def compute_checksums(manifest: WeightManifest, arena: WeightArena) -> WeightChecksums:
    """Checksums of every entry of the arena, by its device's algorithm."""
    return WeightChecksums(
        algorithm=arena.checksum_algorithm,
        values=_hash_entries(manifest, arena, samples_only=False),
        samples=_hash_entries(manifest, arena, samples_only=True),
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
    chosen = msgspec.structs.replace(manifest, entries=tuple(e for e in manifest.entries if e.name in expected))
    actual = _hash_entries(chosen, arena, samples_only=samples_only)
    return [entry.name for entry, value in zip(chosen.entries, actual, strict=True) if value != expected[entry.name]]


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


def _hash_entries(manifest: WeightManifest, arena: WeightArena, *, samples_only: bool) -> tuple[str, ...]:
    if arena.device == "cuda":
        from ramet.srt.model_loader.arena.cuda_hash import hash_entries

        return hash_entries(manifest, arena)  # so fast that samples would save nothing
    return _map_entries(manifest, arena.memory, _hash_sample if samples_only else _hash_entry)


def _map_entries(
    manifest: WeightManifest, memory: memoryview, function: Callable[[memoryview], str]
) -> tuple[str, ...]:
    def run(entry: WeightEntry) -> str:
        return function(memory[entry.offset : entry.offset + entry.nbytes])

    # The hash runs without the GIL. Large entries go first, so that no thread is left with one at the end.
    order = sorted(range(len(manifest.entries)), key=lambda i: -manifest.entries[i].nbytes)
    with ThreadPoolExecutor(num_copy_threads(), thread_name_prefix="checksum") as pool:
        hashed = dict(zip(order, pool.map(run, (manifest.entries[i] for i in order)), strict=True))
    return tuple(hashed[i] for i in range(len(manifest.entries)))


def _hash_entry(data: memoryview) -> str:
    return xxhash.xxh3_64_hexdigest(data)


def _hash_sample(data: memoryview) -> str:
    if data.nbytes <= 3 * SAMPLE_BYTES:
        return xxhash.xxh3_64_hexdigest(data)
    middle = data.nbytes // 2
    digest = xxhash.xxh3_64(data[:SAMPLE_BYTES])
    digest.update(data[middle : middle + SAMPLE_BYTES])
    digest.update(data[-SAMPLE_BYTES:])
    return digest.hexdigest()
