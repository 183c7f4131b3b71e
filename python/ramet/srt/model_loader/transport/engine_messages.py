"""Owns what a rank and its transport process say to each other. Each message is one packet of a Unix socket."""

import msgspec

MESSAGE_BYTES = 64 << 10  # a batch of 256 ranges takes 8 kB of it
MAX_FDS = 4


class StartEngine(msgspec.Struct, frozen=True, tag=True):
    """Start Mooncake; once, before everything else."""

    name: str  # address of this host, by which the other side reaches it
    address: str  # the only one to listen on
    protocol: str
    devices: str  # for RDMA, joined by commas; empty: all
    port: int = 0  # where it must listen; 0: anywhere
    gpu_id: int = -1  # whose memory will be offered; -1: none's


class OfferMemory(msgspec.Struct, frozen=True, tag=True):
    """Let others read memory: the attached file, or a GPU's by its handle or as the attached descriptor."""

    nbytes: int
    address: int = 0  # where it must be seen; 0: anywhere
    cuda_ipc_handle: bytes = b""
    offset: int = 0  # in what the handle opens
    gpu_id: int = -1  # of the GPU whose memory the descriptor is; -1: a file


class OpenWindow(msgspec.Struct, frozen=True, tag=True):
    """Get ready to receive into the attached files, one behind the other."""

    nbytes: list[int]  # of each, in whole pages


class ReadRanges(msgspec.Struct, frozen=True, tag=True):
    """Read ranges of a peer's memory into memory at addresses of the transport process."""

    session_id: str
    local: list[int]
    remote: list[int]
    nbytes: list[int]


class Ping(msgspec.Struct, frozen=True, tag=True):
    """Show that the process moves."""


EngineRequest = StartEngine | OfferMemory | OpenWindow | ReadRanges | Ping


class EngineReply(msgspec.Struct, frozen=True, omit_defaults=True):
    """What every request gets, in any order."""

    number: int
    error: str = ""
    is_missing: bool = False  # the error is that Mooncake can't be imported
    address: int = 0  # of memory, as others name it
    port: int = 0  # of the engine


class Numbered(msgspec.Struct, frozen=True):
    """A request, and the number that its reply will have."""

    number: int
    request: EngineRequest
