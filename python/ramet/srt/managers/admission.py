"""Owns who waits, whose prompt is in progress, and of which prompts the next pass computes a chunk."""

import bisect
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

from ramet.srt.configs.scheduler_config import SchedulerConfig
from ramet.srt.managers.lora_slots import LoraRoom, LoraSlots
from ramet.srt.managers.prefill_adder import GroupRoom, PrefillAdder
from ramet.srt.managers.schedule_batch import Req, RunningReq
from ramet.srt.managers.schedule_policy import Candidate, aged_arrival_s, max_share, place_of
from ramet.srt.managers.token_budget import TokenBudget
from ramet.srt.mem_cache.allocator import RowAllocator
from ramet.srt.mem_cache.request_cache import RequestCache

NEW_TOKEN_RATIO = 0.4
NEW_TOKEN_RATIO_STEP = 0.1
NEW_TOKEN_RATIO_DECAY = 0.998
MIN_NEW_TOKEN_RATIO = 0.1
LOOK_AHEAD = 128  # waiting requests: to match more of them with the prefix cache costs more than the order gains


class TokenReserve:
    """The KV cache that admission leaves to the tokens which running requests will still make.

    It is a share of all that they may make, since most end earlier: a larger one after each retraction, and a smaller
    one with each pass in which requests decode.
    """

    def __init__(self) -> None:
        self._ratio = NEW_TOKEN_RATIO

    def num_pages(self, reqs: Sequence[RunningReq], cache: RequestCache) -> int:
        """Pages to leave free in the cache of `reqs`, which run."""
        tokens = sum(max(0, running.num_remaining_tokens) for running in reqs) * self._ratio
        return cache.num_pages(int(tokens)) + len(reqs)

    def grow(self) -> None:
        """It was too small: a request has been retracted."""
        self._ratio = min(1.0, self._ratio + NEW_TOKEN_RATIO_STEP)

    def decay(self) -> None:
        """A pass found room for the next tokens."""
        self._ratio = max(MIN_NEW_TOKEN_RATIO, self._ratio * NEW_TOKEN_RATIO_DECAY)


class Admission:
    """The waiting requests, and those whose prompts are in progress: a part of them is computed.

    Args:
        caches: one for each attention group: its ranks alone hold the keys and values of its requests.
        rows: of the page table, one for each request that may hold KV cache at a time.
        clock: gives the time in seconds.
        lora_slots: of adapters, one for each that running requests may have.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        caches: Sequence[RequestCache],
        rows: RowAllocator,
        budget: TokenBudget,
        clock: Callable[[], float],
        lora_slots: LoraSlots,
    ):
        self._policy = config.schedule_policy
        self._caches = caches
        self._rows = rows
        self._budget = budget
        self._clock = clock
        self._lora_slots = lora_slots
        # Those that have run before, then the others in the order of their arrival, or by their priority.
        self.waiting: deque[Req] = deque()
        self.in_progress: list[RunningReq] = []
        self.reserve = TokenReserve()

    def __len__(self) -> int:
        """Requests whose prompts are still to be computed."""
        return len(self.waiting) + len(self.in_progress)

    def put(self, req: Req) -> None:
        """Let a request wait for its turn."""
        if req.arrival_s is None:
            req.arrival_s = self._clock()
        req.waits_since_s = self._clock() if req.has_run else req.arrival_s
        if req.has_run:
            self.waiting.appendleft(req)
        elif self._policy == "priority":
            bisect.insort(self.waiting, req, key=lambda other: (not other.has_run, aged_arrival_s(other)))
        else:
            self.waiting.append(req)

    def put_back(self, running: RunningReq, *, for_room: bool = True) -> None:
        """Let a request wait whose cache was taken away.

        Args:
            for_room: whether that was because others needed it.
        """
        self.drop(running)
        running.req.start_over()
        self.put(running.req)
        if for_room:
            self.reserve.grow()

    def take_out(self, is_meant: Callable[[str], bool]) -> list[Req]:
        """Remove and return the waiting requests whose ids are meant."""
        found = [req for req in self.waiting if is_meant(req.rid)]
        for req in found:
            self._end_waiting(req)
        return found

    def oldest_wait_s(self, others_since_s: Iterable[float]) -> float:
        """Seconds for which the request has waited that has waited longest; 0.0 if none waits.

        Args:
            others_since_s: when those came that wait for something else before they come here.
        """
        since = min((*others_since_s, *(req.waits_since_s for req in self.waiting)), default=None)
        return 0.0 if since is None else self._clock() - since

    def drop(self, running: RunningReq) -> None:
        """Compute nothing more of a request's prompt, if it is in progress."""
        if running in self.in_progress:
            self.in_progress.remove(running)

    def least_busy_group(self, others: Iterable[int]) -> int:
        """The attention group with the fewest requests, to which the next one goes.

        Args:
            others: the group of each request that is not here.
        """
        loads = [0] * len(self._caches)
        here = (*(running.group for running in self.in_progress), *(req.group for req in self.waiting))
        for group in (*others, *here):
            loads[group] += 1
        return loads.index(min(loads))

    def next_chunks(self, running: Sequence[RunningReq], num_others: int = 0) -> list[RunningReq]:
        """The requests of whose prompts the next pass computes a chunk: their `extend_len` says how much.

        Args:
            running: those whose prompts are computed.
            num_others: tokens of the pass beside those of prompts.
        """
        prompts = self._prompts()
        if not prompts:
            return []
        is_decoding = any(one.req.pooling is None for one in running)
        num_waiting = sum(prompt.missing_len for prompt in prompts)
        budget = self._budget.num_tokens(is_decoding, num_others, num_waiting)
        adder = PrefillAdder(self._rooms(running), budget, max_share(self._policy), LoraRoom(self._lora_slots))
        for prompt in prompts:
            if adder.budget <= 0:
                break
            if isinstance(prompt, RunningReq):
                adder.add(prompt)
            elif self._rows.num_free and adder.begin(prompt):
                self._end_waiting(prompt.req)
        adder.top_up()
        self._update_progress(adder.reqs)
        return adder.reqs

    def _end_waiting(self, req: Req) -> None:
        """A request waits no longer: it is computed now, or never will be."""
        self.waiting.remove(req)
        if not req.has_run and req.arrival_s is not None:
            req.queue_time_s = self._clock() - req.arrival_s

    def note_first_token(self, req: Req) -> None:
        """All of a prompt is computed; a later call changes nothing."""
        if req.prefill_time_s == 0.0 and req.arrival_s is not None:
            req.prefill_time_s = self._clock() - req.arrival_s - req.queue_time_s

    def _update_progress(self, chunks: Sequence[RunningReq]) -> None:
        """Remember whose prompts have still a part to come, once these chunks are computed."""
        last = {running for running in chunks if running.is_last_chunk}
        everyone = dict.fromkeys([*self.in_progress, *chunks])
        self.in_progress = [running for running in everyone if running not in last]

    def _prompts(self) -> list[RunningReq | Candidate]:
        """All that the next pass may compute a part of, in their order."""
        prompts: list[RunningReq | Candidate] = [*self.in_progress]
        if self._rows.num_free:
            prompts += [Candidate(req, self._caches[req.group]) for req in self._first_waiting()]
        if len(prompts) > 1:
            policy, token_s, now_s = self._policy, self._budget.token_s, self._clock()
            prompts.sort(key=lambda prompt: place_of(prompt, policy, token_s, now_s))
        return prompts

    def _first_waiting(self) -> Iterator[Req]:
        """The requests that come first, up to LOOK_AHEAD of each attention group."""
        num_left = [LOOK_AHEAD] * len(self._caches)
        num_open = len(num_left)
        for req in self.waiting:
            if num_left[req.group] == 0:
                continue
            yield req
            num_left[req.group] -= 1
            num_open -= num_left[req.group] == 0
            if num_open == 0:
                return

    def _rooms(self, running: Sequence[RunningReq]) -> list[GroupRoom]:
        """What each attention group has for new requests."""
        if not self.waiting or not self._rows.num_free:
            return [GroupRoom(cache, 0) for cache in self._caches]
        holders: list[list[RunningReq]] = [[] for _ in self._caches]
        for one in (*running, *self.in_progress):
            holders[one.group].append(one)
        return [
            GroupRoom(cache, self.reserve.num_pages(reqs, cache))
            for cache, reqs in zip(self._caches, holders, strict=True)
        ]
