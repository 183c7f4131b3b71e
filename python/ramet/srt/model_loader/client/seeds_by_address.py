"""Owns the seeds at addresses that were given: asking all of them at once, and which of them go together."""

import contextlib
import logging
import queue
import sys
import threading
import time
from collections.abc import Iterator, Sequence

from ramet.srt.configs.load_config import LoadConfig
from ramet.srt.model_loader.client.seed_finder import FoundSeeds
from ramet.srt.model_loader.client.seed_instance import SeedInstance
from ramet.srt.model_loader.client.transfer import combine_errors
from ramet.srt.model_loader.remote_instance_weight_loader_utils import fetch_seed_answer
from ramet.srt.weights.errors import WeightTransferError, name_some
from ramet.srt.weights.manifest import WeightManifest, content_checksums

logger = logging.getLogger(__name__)

NUM_RETRIES = 2  # of seeds that change their weights while they are taken
LATE_GRACE_S = 1.0  # once one seed has answered, the others get this long


class SeedsByAddress:
    """A SeedFinder with one candidate, the addresses: several seeds share the work. Nobody claims the files here.

    Where a digest is required, those that were left out because they have other weights than the first are the next
    candidate: it may be the first that lies. Seeds that have other weights now than when they were asked, because they
    change them, are asked again.
    """

    claim = None

    def __init__(self, config: LoadConfig, manifest: WeightManifest, _model_path: str = "") -> None:
        """Raises ValueError if there are no addresses."""
        if not config.seeds:
            raise ValueError("loading from a remote instance needs the seed's address and port, or ModelExpress")
        self._config = config
        self._manifest = manifest
        self._name = ", ".join(address.name for address in config.seeds)
        self._addresses = config.seeds  # of the candidate
        self._left_out: list[str] = []
        self._chosen: list[SeedInstance] = []  # of the candidate that was opened last

    @property
    def origin(self) -> str:
        return f"the seed {self._name}"

    def candidates(self) -> Iterator[str]:
        """The addresses, as they are called together."""
        yield self._name
        for _ in range(NUM_RETRIES):
            if not self._have_changed():
                break
            logger.info("rank %d: %s has other weights now than when it was asked: starting over",
                        self._manifest.parallel.world_rank, self._name)  # fmt: skip
            yield self._name
        while self._left_out and self._config.weights_digest is not None:
            self._addresses = tuple(address for address in self._addresses if address.name in self._left_out)
            yield ", ".join(self._left_out)

    def open(self, candidate: str) -> FoundSeeds:
        """The seeds that can fill the arena, in the order of the configuration; what is wrong with others is logged.

        Raises:
            WeightTransferError: if there is none.
        """
        rank = self._manifest.parallel.world_rank
        seeds = [SeedInstance(address, self._config, self._manifest) for address in self._addresses]
        self._left_out = []
        found, errors = _ask_all(seeds, rank, self._config.timeout_s)
        if not found:
            raise combine_errors(rank, [errors[seed.name] for seed in seeds])
        for name, error in errors.items():
            logger.warning("rank %d: the seed %s is left out: %s", rank, name, error)
        chosen = _agreeing(found, rank)
        self._left_out = [seed.name for seed in found if seed not in chosen]
        self._chosen = chosen
        return FoundSeeds(candidate, chosen)

    def _have_changed(self) -> bool:
        """Whether a rank of the seeds that were chosen has registered anew since it was asked."""
        chosen, self._chosen = self._chosen, []
        for rank in (rank for seed in chosen for rank in seed.ranks if rank.answer.manifest is not None):
            known, timeout_s = rank.answer, self._config.timeout_s
            try:
                now = fetch_seed_answer(rank.server, known.rank, known.role, timeout_s, start_grace_s=0.0)
            except WeightTransferError:
                continue  # it has ended, and nothing can be had from it
            if now != known:
                return True
        return False

    def give_up(self, _candidate: str, _error: WeightTransferError) -> None:
        """There is no other candidate: the loader says what follows."""

    def shortage(self) -> None:
        """What the seeds said is all there is to say."""

    def close(self) -> None:
        """Nothing is open between two calls."""


def _ask_all(
    seeds: Sequence[SeedInstance], rank: int, timeout_s: float
) -> tuple[list[SeedInstance], dict[str, WeightTransferError]]:
    """Ask each seed in a thread of its own. Returns those that have the weights, and by name why others don't."""
    results: queue.SimpleQueue[tuple[SeedInstance, BaseException | None]] = queue.SimpleQueue()

    def ask(seed: SeedInstance) -> None:
        with contextlib.suppress(Exception):  # the thread that waits has it, and raises what is no failure of a seed
            try:
                seed.find_ranks()
            finally:
                results.put((seed, sys.exception()))

    for seed in seeds:
        threading.Thread(target=ask, args=(seed,), name="ask-seed", daemon=True).start()
    outcomes: dict[str, WeightTransferError | None] = {}
    # Each seed's requests have their own time limit; looking its name up has none.
    deadline = time.monotonic() + timeout_s + LATE_GRACE_S
    while len(outcomes) < len(seeds):
        try:
            seed, error = results.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            break
        if error is not None and not isinstance(error, WeightTransferError):
            raise error
        outcomes[seed.name] = error
        if error is None:
            deadline = min(deadline, time.monotonic() + LATE_GRACE_S)
    found, errors = [], {}
    for seed in seeds:
        if seed.name not in outcomes:
            errors[seed.name] = WeightTransferError("ask", rank, seed.name, "it is late")
        elif (failure := outcomes[seed.name]) is not None:
            errors[seed.name] = failure
        else:
            found.append(seed)
    return found, errors


def _agreeing(seeds: list[SeedInstance], rank: int) -> list[SeedInstance]:
    """Those whose weights are the first one's, as far as their versions and checksums tell."""
    known: dict[tuple, str] = {}
    chosen = []
    for seed in seeds:
        if seed.versions and seeds[0].versions and not seed.versions & seeds[0].versions:
            own_version, version = min(seed.versions), min(seeds[0].versions)
            logger.warning("rank %d: the seed %s is left out: its weight version is %s, that of %s %s",
                           rank, seed.name, own_version, seeds[0].name, version)  # fmt: skip
            continue
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
