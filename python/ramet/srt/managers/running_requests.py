"""Owns the requests that hold KV cache, and how they come to it, give way to each other, and give it back."""

import logging
from collections.abc import Iterable, Sequence

from ramet.srt.managers.admission import Admission
from ramet.srt.managers.batch_planner import BatchPlanner
from ramet.srt.managers.lora_slots import LoraSlots
from ramet.srt.managers.schedule_batch import RunningReq, ScheduleBatch
from ramet.srt.managers.schedule_policy import retraction_cost
from ramet.srt.mem_cache.request_cache import RequestCache

logger = logging.getLogger(__name__)


class RunningRequests:
    """Those that decode; the ones whose prompts are in progress are the admission's, and count here, too.

    Args:
        caches: one for each attention group.
    """

    def __init__(
        self, caches: Sequence[RequestCache], admission: Admission, lora_slots: LoraSlots, planner: BatchPlanner
    ):
        self._caches = caches
        self._admission = admission
        self._lora_slots = lora_slots
        self._planner = planner
        self.decoding: list[RunningReq] = []
        self.num_retracted = 0  # how often a request had to give way

    def admitted(self) -> list[RunningReq]:
        """Every request that holds KV cache."""
        return [*self.decoding, *self._admission.in_progress]

    def note_launched(self, batch: ScheduleBatch) -> None:
        """A pass is queued.

        The ranks run passes in their order, so from here on the cache holds what this one computes for those after it.
        """
        for running in batch.reqs:
            running.handle.kv_len += running.extend_len
        for running in batch.chunks:
            self._caches[running.group].share(running.handle, running.req.fill_ids)
        for running in batch.reqs:
            self._caches[running.group].pass_by(running.handle)
            if running.handle.state is not None and running.handle.state.saved:
                self._caches[running.group].note_states(running.handle, running.req.fill_ids)
        self.decoding += [running for running in batch.chunks if running.missing_len == 0]
        for running in (*batch.sampled_reqs, *batch.pooled_reqs):
            running.num_pending += 1

    # -- Room for the next token

    def must_start_over(self, running: RunningReq) -> bool:
        """Whether the request's next token is of a sequence whose keys are others than it has."""
        return self._caches[running.group].must_start_over(running.handle, running.seq_len)

    def extend(self, running: RunningReq) -> bool:
        """Give a request room for its next token; False if there is none."""
        return self._caches[running.group].extend(running.handle, running.seq_len)

    def make_room(self, reqs: list[RunningReq]) -> list[RunningReq]:
        """Those of `reqs` that have room for their next token, once others have given theirs."""
        retracted: set[RunningReq] = set()
        for running in reqs:
            while running not in retracted and not self.extend(running):
                cache = self._caches[running.group]
                victim = min(self._retractable(running.group), key=lambda other: retraction_cost(other, cache))
                self._retract(victim)
                retracted.add(victim)
        return [running for running in reqs if running not in retracted]

    def _retractable(self, group: int) -> list[RunningReq]:
        """Who can start over: all of its tokens are known, and no log-probabilities of its prompt would come twice."""
        return [
            running
            for running in self.admitted()
            if running.group == group
            and running.num_pending == 0
            and (running.req.output_ids or not running.req.wants_input_logprobs)
        ]

    def _retract(self, running: RunningReq) -> None:
        """Take a request's cache away; it starts over from its tokens when there is room."""
        self.put_back(running, for_room=True)
        self.num_retracted += 1
        logger.info(
            "KV cache full: retracted request %s after %d output tokens", running.req.rid, len(running.req.output_ids)
        )

    # -- Out of the cache

    def put_back(self, running: RunningReq, *, for_room: bool) -> None:
        """Have a request start over from its tokens.

        Args:
            for_room: whether that is because others need its cache.
        """
        self._release(running)
        if running in self.decoding:
            self.decoding.remove(running)
        self._admission.put_back(running, for_room=for_room)

    def park(self, reqs: Iterable[RunningReq]) -> None:
        """Have requests that decode give their cache back while their constraint takes a token."""
        for running in reqs:
            self._release(running)
            running.is_parked = True
            self.decoding.remove(running)

    def end(self, running: RunningReq) -> None:
        """Take back what a request holds that has ended."""
        if not running.is_parked:
            self._release(running)
        if running.req.grammar is not None:
            running.req.grammar.close()

    def drop_ended(self) -> None:
        """Decode no further what has ended."""
        self.decoding = [running for running in self.decoding if running.req.finish_reason is None]

    def _release(self, running: RunningReq) -> None:
        """Take back what a request that stops running holds, here and on the ranks."""
        self._caches[running.group].release(running.handle, running.req.fill_ids)
        self._lora_slots.give_back(running.req.lora_id)
        self._planner.forget(running.req.rid)
