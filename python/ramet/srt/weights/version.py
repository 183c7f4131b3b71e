"""Owns the name of a version of weights: what it may be, and what is said where two of them should be one."""

import re
from collections.abc import Mapping

DEFAULT_VERSION = "default"
MADE_UP = re.compile(r"default|update-\d+")  # what an instance calls weights that come without a name
MAX_VERSION_LEN = 256


def check_version(version: str, what: str = "the weight version") -> str:
    """Raises ValueError unless `version` is a name: it stands in answers, records and metrics."""
    if not isinstance(version, str):
        raise TypeError(f"{what} must be a string; got {version!r}")
    if not 0 < len(version) <= MAX_VERSION_LEN or not version.isprintable():
        raise ValueError(f"{what} must be 1 to {MAX_VERSION_LEN} printable characters; got {version[:300]!r}")
    return version


def check_shared_version(version: str, what: str) -> str:
    """Raises ValueError unless `version` is a name that stands for one content, whoever says it."""
    if MADE_UP.fullmatch(check_version(version, what)):
        raise ValueError(
            f"{what} can't be {version!r}: instances call weights so that come without a name, each its own"
        )
    return version


def check_same_version(versions: Mapping[int, str]) -> None:
    """Raises ValueError unless all ranks, by their numbers, have the same version of the weights."""
    first_rank, first = next(iter(versions.items()))
    for rank, version in versions.items():
        if version != first:
            raise ValueError(
                f"rank {rank} has loaded the weight version {version!r}, and rank {first_rank} {first!r}: the weights "
                "have changed at their source meanwhile; start again"
            )
