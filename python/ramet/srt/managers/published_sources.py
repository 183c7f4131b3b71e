"""Owns finding what a trainer publishes: of one version, and whole before anything is taken. Moves none."""

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ramet.srt.configs.load_config import LoadConfig
from ramet.srt.model_loader.remote_instance_weight_loader_utils import SeedServer, fetch_seed_answer
from ramet.srt.utils.net import SeedAddress
from ramet.srt.weights.errors import WeightTransferError
from ramet.srt.weights.manifest import WeightChecksums
from ramet.srt.weights.published_model import find_gap
from ramet.srt.weights.registration import SeedAnswer
from ramet.srt.weights.update_messages import TrainerRank, TrainerSource

logger = logging.getLogger(__name__)

ROLE, RANK = "target", 0
SETTLE_S = 10.0  # for all ranks of a trainer to have published a version that one of them has
POLL_S = 0.25
LISTED_TIMEOUT_S = 5.0
MAX_ASKED_AT_ONCE = 16


def _nobody_waits(*, has_it: bool) -> None:
    """What is found by an address is nobody's turn."""


@dataclass(frozen=True)
class FoundPublication:
    """A version that a trainer publishes, and what it was when it was found."""

    source: TrainerSource
    origin: str
    config: LoadConfig
    content: tuple[WeightChecksums, ...]  # of all its ranks
    model_path: str | None = None
    on_end: Callable[..., None] = _nobody_waits  # of the attempt to serve it

    @property
    def version(self) -> str:
        """As the trainer calls it."""
        return self.source.version

    def is_unchanged(self) -> bool:
        """Whether all ranks still publish the same: what the own ranks have taken is of one piece then.

        Raises:
            WeightTransferError: if one does not answer.
        """
        addresses = [SeedAddress(one.host, one.port, one.scheme) for one in self.source.ranks]
        answers = ask_trainer(addresses, self.config, is_listed=self.source.is_listed)
        return _content(answers) == self.content

    def end(self, *, has_it: bool) -> None:
        """The attempt to serve it has ended: others may have it from here, or their turn."""
        self.on_end(has_it=has_it)


def ask_trainer(addresses: Sequence[SeedAddress], config: LoadConfig, *, is_listed: bool) -> list[SeedAnswer]:
    """What each rank of a trainer publishes now. Raises WeightTransferError if one does not answer."""

    def ask(address: SeedAddress) -> SeedAnswer:
        server = SeedServer(address, config.api_keys, config.ssl_ca_certs, shows_keys=not is_listed)
        return fetch_seed_answer(server, RANK, ROLE, config.timeout_s)

    with ThreadPoolExecutor(min(MAX_ASKED_AT_ONCE, len(addresses))) as pool:
        return list(pool.map(ask, addresses))


def find_publication(
    look: Callable[[], Sequence[SeedAddress]],
    config: LoadConfig,
    digest: str | None,
    *,
    version: str | None = None,
    is_listed: bool = False,
) -> FoundPublication:
    """What the ranks of a trainer publish together, once it is of one version and nothing is missing.

    Args:
        look: the addresses of its ranks, as far as they are known by now.
        digest: that the weights must have, which nobody knows of a trainer's.
        version: that is wanted; None: whatever they publish.

    Raises:
        ValueError: if they don't within SETTLE_S, or a digest is wanted.
        WeightTransferError: if one does not answer.
    """
    if digest is not None:
        raise ValueError("what a trainer publishes has no digest: leave weights_digest out")
    deadline = time.monotonic() + SETTLE_S
    while True:
        addresses = look()
        obstacle: str | None = "its ranks are not listed any more"
        failure = ""
        if is_listed and addresses:
            addresses, failure = _living(addresses, config)
            obstacle = "none of its ranks answers"
        if addresses:
            answers = ask_trainer(addresses, config, is_listed=is_listed)
            obstacle = _obstacle(answers, version) or _gap(answers, can_come=is_listed)
            if obstacle is None:
                return _found(addresses, answers, config, is_listed)
        if time.monotonic() > deadline:
            raise ValueError(f"{_name(addresses)}: {obstacle}{failure and f' ({failure})'}")
        time.sleep(POLL_S)


def _living(addresses: Sequence[SeedAddress], config: LoadConfig) -> tuple[list[SeedAddress], str]:
    """Those that answer, and why another does not: records of processes that were killed stay listed for a while."""

    def failure_of(address: SeedAddress) -> str:
        server = SeedServer(address, config.api_keys, config.ssl_ca_certs, shows_keys=False)
        try:
            fetch_seed_answer(server, RANK, ROLE, min(LISTED_TIMEOUT_S, config.timeout_s), is_listed=True)
        except WeightTransferError as error:
            logger.info("a rank of a trainer is passed over: %s", error)
            return str(error)
        return ""

    with ThreadPoolExecutor(MAX_ASKED_AT_ONCE) as pool:
        failures = list(pool.map(failure_of, addresses))
    alive = [address for address, failure in zip(addresses, failures, strict=True) if not failure]
    return alive, next(filter(None, failures), "")


def _obstacle(answers: Sequence[SeedAnswer], version: str | None) -> str | None:
    """Why what ranks of a trainer publish does not go together; None if it does."""
    published = [answer.published for answer in answers if answer.published is not None]
    if len(published) < len(answers) or not answers:
        raise ValueError("some of these are ranks of a trainer, and others are not")
    if len({one.run for one in published}) > 1:
        names = ", ".join(sorted({one.run or "one without a name" for one in published}))
        return (
            f"they are of several runs ({names}); ranks of one trainer are in torch.distributed's default group, or "
            "are given the same run"
        )
    versions = {answer.manifest.weight_version for answer in answers if answer.manifest is not None}
    if len(versions) > 1 or version is not None and versions != {version}:
        return f"they publish {', '.join(sorted(versions))}, not {'one version' if version is None else version}"
    return None


def _gap(answers: Sequence[SeedAnswer], *, can_come: bool) -> str | None:
    """What nobody has of a version; None if nothing is missing.

    Args:
        can_come: whether ranks may still be listed that have it; else it is an error.

    Raises:
        ValueError: see above.
    """
    gap = find_gap(answers)
    if gap is not None and not can_come:
        raise ValueError(f"no rank of the trainer has all of {gap}: give the addresses of all its ranks")
    return None if gap is None else f"no rank of the trainer that is listed has all of {gap}"


def _found(
    addresses: Sequence[SeedAddress], answers: Sequence[SeedAnswer], config: LoadConfig, is_listed: bool
) -> FoundPublication:
    manifest = answers[0].manifest
    assert manifest is not None
    ranks = [TrainerRank(one.host, one.port, one.scheme) for one in addresses]
    source = TrainerSource(ranks=ranks, version=manifest.weight_version, is_listed=is_listed)
    return FoundPublication(source, f"the trainer at {_name(addresses)}", config, _content(answers))


def _content(answers: Sequence[SeedAnswer]) -> tuple[WeightChecksums, ...]:
    content = []
    for answer in answers:
        if answer.manifest is None or answer.manifest.checksums is None:
            raise WeightTransferError("ask", RANK, "the trainer", "it does not say the checksums of its weights")
        content.append(answer.manifest.checksums)
    return tuple(content)


def _name(addresses: Sequence[SeedAddress]) -> str:
    first = addresses[0].name if addresses else "the trainer"
    return first if len(addresses) < 2 else f"{first} and {len(addresses) - 1} more"
