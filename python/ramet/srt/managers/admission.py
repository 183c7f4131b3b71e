"""Owns who waits and who gets into the next prefill pass, over all attention groups."""

from collections import deque
from collections.abc import Callable, Iterable, Sequence

from ramet.srt.configs.scheduler_config import SchedulerConfig
from ramet.srt.managers.schedule_batch import Req, RunningReq
from ramet.srt.managers.schedule_policy import PrefillAdder, order_waiting
from ramet.srt.mem_cache.request_cache import RequestCache

NEW_TOKEN_RATIO = 0.4
NEW_TOKEN_RATIO_STEP = 0.1
NEW_TOKEN_RATIO_DECAY = 0.998
MIN_NEW_TOKEN_RATIO = 0.1


class TokenReserve:
    """The KV cache that admission leaves to the tokens which running requests will still make.

    It is a share of all that they may make, since most end earlier: a larger one after each retraction, and a smaller
    one with each decode pass.
    """

    def __init__(self) -> None:
        self._ratio = NEW_TOKEN_RATIO

    def num_pages(self, reqs: Sequence[RunningReq], cache: RequestCache) -> int:
        """Pages to leave free in the cache of `reqs`, which are decoding."""
        tokens = sum(running.num_remaining_tokens for running in reqs) * self._ratio
        return cache.num_pages(int(tokens)) + len(reqs)

    def grow(self) -> None:
        """It was too small: a request has been retracted."""
        self._ratio = min(1.0, self._ratio + NEW_TOKEN_RATIO_STEP)

    def decay(self) -> None:
        """A decode pass found room for its tokens."""
        self._ratio = max(MIN_NEW_TOKEN_RATIO, self._ratio * NEW_TOKEN_RATIO_DECAY)


class Admission:
    """The waiting requests, and those whose prompts are computed chunk by chunk.

    Args:
        caches: one for each attention group: its ranks alone hold the keys and values of its requests.
    """

    def __init__(self, config: SchedulerConfig, caches: Sequence[RequestCache]):
        self._config = config
        self._caches = caches
        self.waiting: deque[Req] = deque()
        self.chunked: dict[int, RunningReq] = {}  # by group: whose prompt did not fit into the last prefill pass
        self.reserve = TokenReserve()

    def __len__(self) -> int:
        """Requests whose prompts are still to be computed."""
        return len(self.waiting) + len(self.chunked)

    def put(self, req: Req) -> None:
        """Let a request wait for its turn."""
        self.waiting.append(req)

    def put_back(self, req: Req) -> None:
        """Let a request wait whose cache was taken away."""
        self.waiting.appendleft(req)
        self.reserve.grow()

    def take_out(self, is_meant: Callable[[str], bool]) -> list[Req]:
        """Remove and return the waiting requests whose ids are meant."""
        found = [req for req in self.waiting if is_meant(req.rid)]
        for req in found:
            self.waiting.remove(req)
        return found

    def drop_chunked(self, running: RunningReq) -> None:
        """Compute no further chunk of a request's prompt, if one was to come."""
        if self.chunked.get(running.group) is running:
            del self.chunked[running.group]

    def least_busy_group(self, others: Iterable[int]) -> int:
        """The attention group with the fewest requests, to which the next one goes.

        Args:
            others: the group of each request that is not here.
        """
        loads = [0] * len(self._caches)
        for group in (*others, *self.chunked, *(req.group for req in self.waiting)):
            loads[group] += 1
        return loads.index(min(loads))

    def next_prefill(self, decoding: Sequence[RunningReq]) -> list[RunningReq]:
        """The requests that the next prefill pass computes, or a chunk of them: their `extend_len` says how much."""
        if not self.waiting and not self.chunked:
            return []
        return [running for group in range(len(self._caches)) for running in self._fill(group, decoding)]

    def _fill(self, group: int, decoding: Sequence[RunningReq]) -> list[RunningReq]:
        config, cache = self._config, self._caches[group]
        adder = PrefillAdder(
            cache,
            config.prefill_budget,
            self.reserve.num_pages([running for running in decoding if running.group == group], cache),
            config.max_running_requests - len(decoding) - len(self.chunked),
        )
        chunked = self.chunked.pop(group, None)
        if chunked is not None:
            adder.add_chunked(chunked)
        queue = [req for req in self.waiting if req.group == group]
        for candidate in order_waiting(queue, cache, config.schedule_policy):
            if adder.shares_uncached_prefix(candidate):
                continue
            if not adder.add(candidate):
                break
            self.waiting.remove(candidate.req)
        if adder.chunked_req is not None:
            self.chunked[group] = adder.chunked_req
        return adder.reqs
