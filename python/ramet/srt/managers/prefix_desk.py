"""Owns copying cached prefixes out of a replica's cache and into it, between two passes. Who may, others decide."""

from ramet.srt.managers.prefix_messages import (
    HottestPrefixesOutput,
    HottestPrefixesReq,
    PrefixCopyOutput,
    PrefixCopyReq,
    PrefixPagesOutput,
    PrefixRun,
    ReadPrefixReq,
    WritePrefixReq,
)
from ramet.srt.managers.scheduler import Scheduler

MAX_READ_BYTES = 8 << 20  # at once: requests wait for as long as this takes


class PrefixDesk:
    """Of one replica."""

    def __init__(self, scheduler: Scheduler):
        self._scheduler = scheduler

    def handle(self, message: PrefixCopyReq) -> PrefixCopyOutput:
        """What a message comes to."""
        if isinstance(message, HottestPrefixesReq):
            return self._hottest(message)
        refusal = self._refusal() or self._difference(message)
        if refusal:
            return PrefixPagesOutput(request_id=message.request_id, refusal=refusal)
        self._scheduler.finish_passes()  # what is cached is computed then
        return self._read(message) if isinstance(message, ReadPrefixReq) else self._write(message)

    def _hottest(self, message: HottestPrefixesReq) -> HottestPrefixesOutput:
        refusal = self._refusal()
        if refusal:
            return HottestPrefixesOutput(request_id=message.request_id, refusal=refusal)
        scheduler, [cache] = self._scheduler, self._scheduler.caches
        return HottestPrefixesOutput(
            request_id=message.request_id,
            layout=self._layout,
            version=scheduler.weight_version,
            generation=cache.tree.generation,
            num_pages=cache.allocator.num_pages,
            page_size=cache.page_size,
            page_nbytes=scheduler.model_runner.kv_pool.page_nbytes,
            runs=[PrefixRun(keys, first) for keys, first in cache.tree.hottest(message.max_pages)],
        )

    def _refusal(self) -> str:
        """Why no page can stand for a prefix here, or be copied."""
        scheduler = self._scheduler
        runner = scheduler.model_runner
        if runner.parallel.world_size > 1:
            return "cached prefixes are copied between instances of one rank only"
        if runner.windows is not None or runner.num_state_slots:
            return "layers with a window or a state keep more of a prefix than its pages"
        if scheduler.caches[0].tree.disabled:
            return "the prefix cache is off"
        if not runner.kv_pool.page_nbytes:
            return "the model keeps nothing of a prefix"
        return "the instance is asleep" if runner.kv_pool.is_put_away else ""

    def _difference(self, message: ReadPrefixReq | WritePrefixReq) -> str:
        if message.version != self._scheduler.weight_version:
            return f"the weight version is {self._scheduler.weight_version!r}, not {message.version!r}"
        if message.layout != self._layout:
            return f"a page is {self._layout!r}, not {message.layout!r}"
        cache = self._scheduler.caches[0]
        is_within = 0 <= message.first < len(message.keys) // cache.page_size
        return "" if is_within and len(message.keys) % cache.page_size == 0 else "these are no whole pages of a prefix"

    @property
    def _layout(self) -> str:
        runner = self._scheduler.model_runner
        return f"{runner.kv_pool.layout} on {runner.device.type}"

    def _read(self, message: ReadPrefixReq) -> PrefixPagesOutput:
        [cache], pool = self._scheduler.caches, self._scheduler.model_runner.kv_pool
        count = min(message.count, max(1, MAX_READ_BYTES // pool.page_nbytes))
        pages = cache.tree.match_prefix(message.keys)[0][message.first :][: max(0, count)]
        data = pool.read_pages(pages) if pages else b""
        return PrefixPagesOutput(request_id=message.request_id, num_pages=len(pages), data=data)

    def _write(self, message: WritePrefixReq) -> PrefixPagesOutput:
        """Only to pages that are free: nothing that this instance has cached itself makes room."""
        [cache], pool = self._scheduler.caches, self._scheduler.model_runner.kv_pool
        count = len(message.keys) // cache.page_size - message.first
        output = PrefixPagesOutput(request_id=message.request_id)
        if message.generation != cache.tree.generation:
            output.refusal = "the weights have changed meanwhile"
        elif len(message.data) != count * pool.page_nbytes:
            output.refusal = f"{len(message.data)} bytes for {count} pages of {pool.page_nbytes}"
        elif len(held := cache.tree.match_prefix(message.keys)[0]) != message.first:
            output.refusal = "" if len(held) > message.first else "the pages before these are not cached"
        elif cache.allocator.num_free < count:
            output.refusal = "no page is free"
        else:
            pages = cache.allocator.alloc(count)
            pool.write_pages(pages, message.data)
            cache.tree.insert(message.keys, held + pages)
            output.num_pages = count
        return output
