"""Owns the version of the weights that a client and its seeds agree on, and the look whether they still have it."""

from collections.abc import Sequence

from ramet.srt.model_loader.client.seed_instance import SeedInstance
from ramet.srt.weights.errors import WeightTransferError
from ramet.srt.weights.version import DEFAULT_VERSION

ASK_TIMEOUT_S = 5.0


class VersionSwitched(WeightTransferError):
    """The weights of a seed have changed since it said what it has: whoever takes them starts over."""


def agreed_version(seeds: Sequence[SeedInstance], rank: int) -> str:
    """The version that all seeds serve, by what they have said; the default one where they don't say.

    Raises:
        VersionSwitched: if they serve several: one of them has changed between two questions, or they are not equal.
    """
    versions = {version: seed.name for seed in seeds for version in seed.versions}
    if len(versions) > 1:
        raise VersionSwitched(
            "agree", rank, ", ".join(versions.values()), f"they serve several versions: {', '.join(sorted(versions))}"
        )
    return next(iter(versions), DEFAULT_VERSION)


def check_versions(seeds: Sequence[SeedInstance], version: str, rank: int) -> None:
    """Ask the seeds again. One that does not answer proves nothing: whoever has asked has other reasons to doubt it.

    Raises:
        VersionSwitched: if one serves another version than was agreed on.
    """
    for seed in seeds:
        others = seed.ask_versions(ASK_TIMEOUT_S) - {version}
        if others:
            cause = f"it serves the weight version {min(others)} now, not {version} any more"
            raise VersionSwitched("agree", rank, seed.name, cause)
