"""Owns what instances that hold the same weights, or parts of them, say to each other: who is there, and who has what.

A connection goes from one that takes to one that gives. The first message is Hello.
"""

import hashlib

import msgspec

from ramet.srt.utils.outside_json import Natural
from ramet.srt.weights.manifest import WeightManifest, layout_digest


class PeerLink(msgspec.Struct, frozen=True, kw_only=True):
    """Where one that gives listens. Whoever was told the token may take."""

    host: str
    port: int
    token: str


class PeerOffer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One that takes, as another one that takes the same can take from it."""

    peer_id: str
    link: PeerLink
    http_port: int = 0  # of its HTTP server, by which reports call it; 0: of the link
    host_identity: str = ""
    socket_name: str = ""  # of its memory, for its own host
    session_id: str = ""  # of its transfer engine; "" if it has none
    arena_address: Natural = 0


class Hello(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """From one that takes: who it is, and what it wants."""

    token: str
    content: str  # see content_name
    offer: PeerOffer | None = None  # None: it gives nothing on


class Offer(msgspec.Struct, frozen=True, tag=True):
    """From one that takes: from now on it gives, too."""

    offer: PeerOffer


class Took(msgspec.Struct, frozen=True, tag=True):
    """From one that takes: so many bytes have come from the other side."""

    nbytes: Natural


class Done(msgspec.Struct, frozen=True, tag=True):
    """From one that takes: it has all, and needs no news any more. It may give for as long as the connection stands."""


class Refused(msgspec.Struct, frozen=True, tag=True):
    """From one that gives, before it ends the connection."""

    reason: str


class Holds(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """From one that gives: which pieces it has and which are on their way to it, a bit for each, the lowest first."""

    has: bytes = b""
    awaits: bytes = b""
    is_whole: bool = False  # it has all


class Others(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """From one that gives: who else takes from it, and gives.

    Who takes shares the work with all of them, also those that it is not told of: of `count` equal shares, it brings
    the one with the number `index`.
    """

    offers: list[PeerOffer]
    index: Natural = 0
    count: int = 1


class Beat(msgspec.Struct, frozen=True, tag=True):
    """There is no news."""


FromTaker = Hello | Offer | Took | Done
FromGiver = Refused | Holds | Others | Beat


def content_name(manifest: WeightManifest) -> str:
    """Equal for arenas that hold the same bytes at the same places.

    Args:
        manifest: with its checksums.
    """
    assert manifest.checksums is not None
    parts = (layout_digest(manifest), manifest.role, manifest.checksums.algorithm, manifest.checksums.values)
    return hashlib.sha256(msgspec.msgpack.encode(parts)).hexdigest()[:32]


def to_bits(numbers: set[int]) -> bytes:
    """A set of numbers, as messages have it."""
    value = sum(1 << number for number in numbers)
    return value.to_bytes((value.bit_length() + 7) // 8, "little")


def from_bits(data: bytes, count: int) -> set[int]:
    """Those below `count`."""
    value = int.from_bytes(data, "little")
    return {number for number in range(count) if value >> number & 1}
