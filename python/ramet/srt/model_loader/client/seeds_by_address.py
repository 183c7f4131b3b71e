"""Owns asking several seed instances at once, and which of them go together."""

import logging
import queue
import threading
import time

from ramet.srt.configs.load_config import LoadConfig
from ramet.srt.model_loader.checksums.entries import content_checksums
from ramet.srt.model_loader.client.seed_instance import SeedInstance
from ramet.srt.model_loader.client.transfer import combine_errors
from ramet.srt.weights.errors import WeightTransferError, name_some
from ramet.srt.weights.manifest import WeightManifest

logger = logging.getLogger(__name__)

LATE_GRACE_S = 1.0  # once one seed has answered, the others get this long


def find_seeds(config: LoadConfig, manifest: WeightManifest) -> list[SeedInstance]:
    """The seeds that can fill a rank's arena, in the order of the configuration; what is wrong with others is logged.

    Raises:
        WeightTransferError: if there is none.
    """
    rank = manifest.parallel.world_rank
    candidates = [SeedInstance(host, port, config, manifest) for host, port in config.seeds]
    results: queue.SimpleQueue[tuple[SeedInstance, Exception | None]] = queue.SimpleQueue()

    def ask(seed: SeedInstance) -> None:
        try:
            seed.find_ranks()
        except Exception as error:  # handed to the caller's thread
            results.put((seed, error))
        else:
            results.put((seed, None))

    for seed in candidates:
        threading.Thread(target=ask, args=(seed,), name="ask-seed", daemon=True).start()
    found: list[SeedInstance] = []
    errors: dict[str, WeightTransferError] = {}
    # Each seed's requests have their own time limit; looking its name up has none.
    deadline = time.monotonic() + config.timeout_s + LATE_GRACE_S
    while len(found) + len(errors) < len(candidates):
        try:
            seed, error = results.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            break
        if isinstance(error, WeightTransferError):
            errors[seed.name] = error
        elif error is not None:
            raise error
        else:
            found.append(seed)
            deadline = min(deadline, time.monotonic() + LATE_GRACE_S)
    for seed in candidates:
        if seed not in found and seed.name not in errors:
            errors[seed.name] = WeightTransferError("ask", rank, seed.name, "it is late")
    if not found:
        raise combine_errors(rank, [errors[seed.name] for seed in candidates])
    for seed in candidates:
        if seed not in found:
            logger.warning("rank %d: the seed %s is left out: %s", rank, seed.name, errors[seed.name])
    return _agreeing([seed for seed in candidates if seed in found], rank)


def _agreeing(seeds: list[SeedInstance], rank: int) -> list[SeedInstance]:
    """Those whose weights are the first one's, as far as their checksums tell."""
    known: dict[tuple, str] = {}
    chosen = []
    for seed in seeds:
        own = {key: value for one in seed.ranks for key, value in content_checksums(one.answer.manifest).items()}
        different = [str(key[1]) for key, value in own.items() if known.get(key, value) != value]
        if different:
            logger.warning(
                "rank %d: the seed %s is left out: its weights are not those of %s: %s differ",
                rank,
                seed.name,
                seeds[0].name,
                name_some(different),
            )
            continue
        known.update(own)
        chosen.append(seed)
    return chosen
