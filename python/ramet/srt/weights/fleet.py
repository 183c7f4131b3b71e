"""Owns what instances of one model and whoever holds their target version say to each other. Pure data."""

from typing import Annotated

import msgspec

from ramet.srt.utils.outside_json import Natural, decode_json
from ramet.srt.weights.version import MAX_VERSION_LEN, check_shared_version

MAX_NAME_LEN = 4096
DEFAULT_MIN_SERVING = 0.75

Share = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
Name = Annotated[str, msgspec.Meta(max_length=MAX_NAME_LEN)]
Version = Annotated[str, msgspec.Meta(max_length=MAX_VERSION_LEN)]


class FleetTarget(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The version that all instances of a model shall serve."""

    number: Natural  # rises from one target of the model to the next: which of two is the older one
    version: Version = ""  # "": none, whatever they serve will do
    previous: Version = ""  # to which they go back if it fails; "": there is none
    min_serving: Share = DEFAULT_MIN_SERVING  # of them, that stay ready while others take it
    failed: Version = ""  # the version in whose place this one is the target again
    reason: Name = ""  # why that has failed


class FleetReport(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What an instance says of itself, about every second."""

    model: Name
    instance: Name  # its URL
    started_at: float
    weight_version: Version  # "" while its weights are none to serve
    is_ready: bool = False  # /ready is 200
    ready_number: Natural = 0  # of the target with which it was ready last; 0: none
    is_taking: bool = False
    failed_number: Natural = 0  # of the target that it could not take
    error: Name = ""
    known: FleetTarget | None = None  # the last one that it was told: a server that has forgotten learns it again


class FleetOrder(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What it is answered."""

    target: FleetTarget | None = None  # None: there has never been one
    takes: bool = False  # now is its turn
    pause_s: float = 1.0  # until it shall report again


class SetTarget(msgspec.Struct, frozen=True, kw_only=True):
    """What an operator says."""

    model: Name
    version: Version  # "": none
    min_serving: Share = DEFAULT_MIN_SERVING


class FleetMemberState(msgspec.Struct, frozen=True, kw_only=True):
    """One instance, as an operator sees it."""

    instance: str
    weight_version: str
    is_ready: bool
    is_taking: bool
    serves_target: bool
    error: str


class FleetState(msgspec.Struct, frozen=True, kw_only=True):
    """One model's instances, as an operator sees them."""

    model: str
    target: FleetTarget | None
    members: list[FleetMemberState]


def read_report(data: bytes) -> FleetReport:
    """Raises ValueError if it is none."""
    report = decode_json(data, FleetReport)
    if not report.model or not report.instance:
        raise ValueError("a report names its model and its instance")
    return report


def read_set_target(data: bytes) -> SetTarget:
    """Raises ValueError if it is none."""
    wanted = decode_json(data, SetTarget)
    if not wanted.model:
        raise ValueError("model is empty")
    if wanted.version:
        check_shared_version(wanted.version, "version")
    return wanted
