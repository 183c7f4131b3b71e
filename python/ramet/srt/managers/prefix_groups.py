"""Owns which decoding requests have a prefix in common, so that attention can read it once for all of them."""

from collections.abc import Sequence
from itertools import groupby

from ramet.srt.batch.batch_plan import SharedPrefix
from ramet.srt.managers.schedule_batch import RunningReq
from ramet.srt.mem_cache.radix_cache import TreeNode
from ramet.srt.mem_cache.request_cache import RequestCache


def place_by_prefix(decoding: list[RunningReq], caches: Sequence[RequestCache]) -> list[RunningReq]:
    """The requests, those of a common prefix side by side and otherwise in their order. Sets their `prefix`."""
    places: dict[TreeNode, int] = {}
    place_of: dict[RunningReq, int] = {}
    for running in decoding:
        running.prefix = prefix = caches[running.group].common_prefix(running.handle)
        place_of[running] = -1 if prefix is None else places.setdefault(prefix.end, len(places))
    return sorted(decoding, key=place_of.__getitem__) if places else decoding


def shared_prefixes(reqs: Sequence[RunningReq]) -> list[SharedPrefix]:
    """The runs of requests with the same prefix, by their places in the pass."""
    shared: list[SharedPrefix] = []
    first = 0
    for prefix, members in groupby(reqs, key=lambda running: running.prefix):
        number = len(list(members))
        if prefix is not None and number > 1:
            shared.append(SharedPrefix(first, number, prefix.num_tokens))
        first += number
    return shared
