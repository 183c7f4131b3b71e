"""Owns what is said of cached prefixes that go from one instance to another: which there are, and their pages."""

import struct
from collections.abc import Sequence

import msgspec

from ramet.srt.utils.outside_json import Natural


class PrefixRun(msgspec.Struct, frozen=True, array_like=True):
    """Pages of one cached prefix, behind those of a shorter one."""

    keys: list[int]  # what stands for the tokens in the prefix tree, from the beginning to the end of the run
    first: int  # index of the run's first page; those before it are of the shorter one


class HottestPrefixesReq(msgspec.Struct, kw_only=True, tag=True):
    """Which prefixes are used most, and lately, and what a cache must be like that can take their pages."""

    request_id: str
    max_pages: int  # of all of them together


class HottestPrefixesOutput(msgspec.Struct, kw_only=True, tag=True):
    request_id: str
    refusal: str = ""  # why pages can't be copied here; "" if they can
    layout: str = ""  # of a page; equal where one can take the other's place
    version: str = ""  # of the weights that have computed them
    generation: int = 0  # of the cache, whose prefixes are lost when the weights change
    num_pages: int = 0  # that the cache has
    page_size: int = 1  # tokens
    page_nbytes: int = 0
    runs: list[PrefixRun] = []


class ReadPrefixReq(msgspec.Struct, kw_only=True, tag=True):
    """The content of pages of a prefix, as far as they are still cached."""

    request_id: str
    layout: str
    version: str
    keys: list[int]
    first: int
    count: int


class WritePrefixReq(msgspec.Struct, kw_only=True, tag=True):
    """Cache pages of a prefix with this content, behind those that are cached of it."""

    request_id: str
    layout: str
    version: str
    keys: list[int]
    first: int
    data: bytes
    generation: int  # as this cache has said


class PrefixPagesOutput(msgspec.Struct, kw_only=True, tag=True):
    """What either comes to."""

    request_id: str
    refusal: str = ""
    num_pages: int = 0  # that were read or written
    data: bytes = b""


PrefixCopyReq = HottestPrefixesReq | ReadPrefixReq | WritePrefixReq
PrefixCopyOutput = HottestPrefixesOutput | PrefixPagesOutput


class HottestBody(msgspec.Struct, frozen=True, kw_only=True):
    """The body of POST /prefix_cache_hottest on the engine's own HTTP port."""

    content: str  # of the weights; see content_name
    max_pages: Natural


class HottestAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """Its answer: what HottestPrefixesOutput has; the keys of each run packed."""

    layout: str
    version: str
    runs: list[tuple[bytes, Natural]]


class PagesBody(msgspec.Struct, frozen=True, kw_only=True):
    """The body of POST /prefix_cache_pages; the answer is the content of as many of the pages as there are."""

    content: str
    layout: str
    version: str
    keys: bytes  # packed
    first: Natural
    count: Natural


def pack_keys(keys: Sequence[int]) -> bytes:
    """Keys, four bytes each, the lowest first."""
    return struct.pack(f"<{len(keys)}i", *keys)


def unpack_keys(data: bytes) -> list[int]:
    """Raises ValueError if they are none."""
    if len(data) % 4:
        raise ValueError(f"{len(data)} bytes are no keys of four bytes each")
    return list(struct.unpack(f"<{len(data) // 4}i", data))
