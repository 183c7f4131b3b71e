"""Owns what a rank and its receiver process say to each other. Each message is one packet of a Unix socket."""

import msgspec

from ramet.srt.utils.net import format_address

MESSAGE_BYTES = 64 << 10


class Place(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Where and as whom to join a group in which a trainer is rank 0."""

    host: str  # of the trainer's store
    port: int
    rank: int
    size: int
    name: str  # of a group of torch's; "": a stateless group of vLLM's, which has none
    timeout_s: float  # for all to come

    @property
    def address(self) -> str:
        """As it is written in messages."""
        return format_address(self.host, self.port)


class Receive(msgspec.Struct, frozen=True, tag=True):
    """Receive the next broadcast into the attached file, all of it."""

    nbytes: int
    timeout_s: float


ReceiverRequest = Place | Receive


class ReceiverReply(msgspec.Struct, frozen=True, omit_defaults=True):
    """What every request gets, one after the other; the first one comes by itself, when the process has started."""

    error: str = ""
