"""Which cached prefixes another instance gets, and when none."""

from types import SimpleNamespace
from typing import Any

import pytest
from ramet.srt.managers.prefix_desk import PrefixDesk
from ramet.srt.managers.prefix_messages import (
    HottestPrefixesReq,
    ReadPrefixReq,
    WritePrefixReq,
    pack_keys,
    unpack_keys,
)
from ramet.srt.mem_cache.allocator import PageAllocator, RowAllocator
from ramet.srt.mem_cache.radix_cache import RadixCache
from ramet.srt.mem_cache.request_cache import RequestCache

PAGE = 2


class Pool:
    """Each page is a byte; see TokenToKVPool."""

    layout, page_nbytes, is_put_away = "bytes", 1, False

    def __init__(self, num_pages: int) -> None:
        self.content = bytearray(num_pages + 1)

    def read_pages(self, pages: list[int]) -> bytes:
        return bytes(self.content[page] for page in pages)

    def write_pages(self, pages: list[int], data: bytes) -> None:
        for page, byte in zip(pages, data, strict=True):
            self.content[page] = byte


class Replica:
    """A desk, and the cache behind it."""

    def __init__(self, num_pages: int = 20, **runner: Any) -> None:
        allocator = PageAllocator(num_pages)
        self.cache = RequestCache(RowAllocator(4), allocator, RadixCache(allocator, PAGE), PAGE)
        self.pool = Pool(num_pages)
        facts = {"windows": None, "num_state_slots": 0, "parallel": SimpleNamespace(world_size=1)} | runner
        device = SimpleNamespace(type="cpu")
        self.scheduler = SimpleNamespace(
            model_runner=SimpleNamespace(kv_pool=self.pool, device=device, **facts),
            caches=[self.cache],
            weight_version="v1",
            finish_passes=lambda: None,
        )
        self.desk = PrefixDesk(self.scheduler)  # type: ignore[arg-type]

    def run(self, tokens: list[int], lora_id: int = 0) -> int:
        """A request computes all its tokens; how many were cached."""
        handle = self.cache.begin(self.cache.match(tokens, None, lora_id), 0)
        assert handle is not None
        cached = handle.kv_len
        assert self.cache.extend(handle, len(tokens))
        for index in range(cached // PAGE, len(tokens) // PAGE):
            self.pool.content[handle.pages[index]] = sum(tokens[: (index + 1) * PAGE])
        handle.kv_len = len(tokens)
        self.cache.release(handle, tokens)
        return cached

    def hottest(self, max_pages: int = 100) -> Any:
        return self.desk.handle(HottestPrefixesReq(request_id="r", max_pages=max_pages))

    def read(self, keys: list[int], first: int, **fields: Any) -> Any:
        given = {"layout": "bytes on cpu", "version": "v1", "count": len(keys) // PAGE - first} | fields
        return self.desk.handle(ReadPrefixReq(request_id="r", keys=keys, first=first, **given))

    def write(self, keys: list[int], first: int, data: bytes, **fields: Any) -> Any:
        given = {"layout": "bytes on cpu", "version": "v1", "generation": 0} | fields
        return self.desk.handle(WritePrefixReq(request_id="r", keys=keys, first=first, data=data, **given))


def runs_of(replica: Replica, max_pages: int = 100) -> list[tuple[list[int], int]]:
    return [(run.keys, run.first) for run in replica.hottest(max_pages).runs]


def test_what_most_requests_have_found_comes_first_and_then_the_latest() -> None:
    replica = Replica()
    replica.run([1, 1, 2, 2])
    replica.run([3, 3, 4, 4])
    replica.run([5, 5])
    replica.run([1, 1, 2, 2, 9, 9])
    assert runs_of(replica) == [([1, 1, 2, 2], 0), ([1, 1, 2, 2, 9, 9], 2), ([5, 5], 0), ([3, 3, 4, 4], 0)]
    assert runs_of(replica, 4) == [([1, 1, 2, 2], 0), ([1, 1, 2, 2, 9, 9], 2), ([5, 5], 0)]
    assert runs_of(replica, 1) == [([1, 1], 0)] and runs_of(replica, 0) == []


def test_a_clones_cache_finds_what_was_copied() -> None:
    giver, taker = Replica(), Replica()
    giver.run([1, 1, 2, 2, 3, 3])
    giver.run([1, 1, 2, 2, 8, 8])
    giver.run([7, 7], lora_id=4)
    for keys, first in runs_of(giver):
        read = giver.read(keys, first)
        assert read.num_pages == len(keys) // PAGE - first
        assert taker.write(keys, first, read.data).num_pages == read.num_pages
    assert taker.run([1, 1, 2, 2, 3, 3, 4, 4]) == 6 and taker.run([1, 1, 2, 2, 8, 8]) == 6
    assert taker.run([7, 7]) == 0, "what an adapter has computed is its own"
    pages = taker.cache.match([1, 1, 2, 2, 8, 8]).pages
    assert taker.pool.read_pages(pages) == bytes([2, 6, 22])
    taker.cache.check([])


def test_what_does_not_fit_is_refused() -> None:
    replica = Replica(num_pages=2)
    assert "before these are not cached" in replica.write([1, 1, 2, 2], 1, b"x").refusal
    assert replica.write([1, 1], 0, b"x").num_pages == 1
    assert replica.write([1, 1], 0, b"y").num_pages == 0, "it is there already"
    assert "no page is free" in replica.write([2, 2, 3, 3], 0, b"xy").refusal
    assert "bytes for 1 pages" in replica.write([2, 2], 0, b"xyz").refusal
    assert "whole pages" in replica.write([2, 2, 3], 0, b"x").refusal
    assert "whole pages" in replica.read([2, 2], 1).refusal
    for fields in ({"version": "v2"}, {"layout": "others"}):
        assert replica.read([1, 1], 0, **fields).refusal and replica.write([2, 2], 0, b"x", **fields).refusal
    assert "changed" in replica.write([2, 2], 0, b"x", generation=1).refusal
    assert replica.read([6, 6], 0).num_pages == 0
    replica.cache.check([])


@pytest.mark.parametrize(
    "runner",
    [{"num_state_slots": 3}, {"windows": object()}, {"parallel": SimpleNamespace(world_size=2)}],
)
def test_models_that_keep_more_than_pages_copy_nothing(runner: dict[str, Any]) -> None:
    replica = Replica(**runner)
    replica.run([1, 1])
    assert replica.hottest().refusal and not replica.hottest().runs
    assert replica.read([1, 1], 0).refusal and replica.write([2, 2], 0, b"x").refusal


def test_keys_are_packed() -> None:
    assert unpack_keys(pack_keys([0, 5, -6, 1 << 30])) == [0, 5, -6, 1 << 30]
    with pytest.raises(ValueError, match="3 bytes"):
        unpack_keys(b"abc")
