"""Owns a replica's loop: it takes messages in, does between two passes what they say, and has the scheduler go on."""

from collections.abc import Sequence

from ramet.srt.managers.io_struct import (
    AbortReq,
    ContinueReqInput,
    ContinueReqOutput,
    FlushCacheReqInput,
    FlushCacheReqOutput,
    GetInternalStateReq,
    GetInternalStateReqOutput,
    LinearStateStats,
    LoadLoraReqInput,
    Message,
    PauseReqInput,
    PauseReqOutput,
    RenameWeightsReqInput,
    RenameWeightsReqOutput,
    StartProfileReqInput,
    StopProfileReqInput,
    TokenizedGenerateReqInput,
    UnloadLoraReqInput,
)
from ramet.srt.managers.load_log import LoadLog
from ramet.srt.managers.lora_desk import LoraDesk
from ramet.srt.managers.prefix_desk import PrefixDesk
from ramet.srt.managers.prefix_messages import PrefixCopyOutput, PrefixCopyReq
from ramet.srt.managers.rank_profiler import profile_reply
from ramet.srt.managers.schedule_batch import ScheduleBatch
from ramet.srt.managers.scheduler import Scheduler
from ramet.srt.managers.scheduler_channel import SchedulerChannel
from ramet.srt.managers.weight_update_desk import WeightUpdateDesk
from ramet.srt.mem_cache.request_cache import RequestCache
from ramet.srt.weights.inspection_messages import (
    WeightInspection,
    WeightInspectionOutput,
)
from ramet.srt.weights.memory_messages import MemoryStep
from ramet.srt.weights.update_messages import WeightStep

IDLE_POLL_S = 1.0
GRAMMAR_POLL_S = 0.001
LOAD_POLL_S = 0.01  # while an adapter is being loaded, an update's step goes on, or a trainer is waited for


class SchedulerLoop:
    """What the main process asks of a replica, beside tokens: it is answered here."""

    def __init__(self, scheduler: Scheduler, channel: SchedulerChannel):
        self.scheduler = scheduler
        self._channel = channel
        runner, tell = scheduler.model_runner, scheduler.passes.tell
        self._load_log = LoadLog(
            scheduler.config.decode_log_interval,
            lambda: self._internal_state(GetInternalStateReq(request_id="")),
            lambda: scheduler.results.throughput.total,
        )
        self._lora = LoraDesk(runner.lora, scheduler.lora_slots, scheduler.caches, tell, channel.reply)
        self._prefixes = PrefixDesk(scheduler)
        self._weight_updates = WeightUpdateDesk(scheduler, runner.versions, tell, channel.reply)

    @property
    def has_work(self) -> bool:
        """Whether any request waits or runs, a pass is under way, or a step of an update goes on beside them."""
        return self.scheduler.has_work or self._weight_updates.is_busy

    def run_once(self) -> None:
        """Take messages in, waiting for the first while there is nothing to do or time to do it, and take a step."""
        scheduler = self.scheduler
        is_idle, spare_s = not scheduler.can_go_on, scheduler.spare_s()
        is_watching = self._weight_updates.is_busy or self._weight_updates.is_joining
        idle_s = LOAD_POLL_S if self._lora or is_watching else IDLE_POLL_S
        messages = self._channel.receive(idle_s if is_idle else spare_s)
        for message in messages:
            self.handle(message)
        if spare_s:
            return  # to look at the time anew
        if is_idle and not messages and not self.has_work:
            scheduler.use_quiet_moment()
        batch = self.step()
        self._load_log.note(batch)
        if batch is None:
            if not self.has_work:
                scheduler.check_caches()
            elif not scheduler.passes:
                scheduler.grammar_steps.poll(GRAMMAR_POLL_S)  # nothing else is to do

    def step(self) -> ScheduleBatch | None:
        """Answer what has ended beside the passes, and have the scheduler take a step. Returns what was queued."""
        self._lora.poll()
        self._weight_updates.poll()
        return self.scheduler.step()

    def handle(self, message: Message) -> None:
        """Do what a message from the tokenizer manager says.

        Raises:
            RuntimeError: if it is one that is not for the scheduler.
        """
        scheduler, reply = self.scheduler, self._channel.reply
        match message:
            case TokenizedGenerateReqInput():
                scheduler.intake.accept(message)
            case AbortReq():
                scheduler.abort(message)
            case LoadLoraReqInput() | UnloadLoraReqInput():
                self._lora.handle(message)
            case PauseReqInput():
                scheduler.pause(message.mode)
                reply(PauseReqOutput(request_id=message.request_id, num_held=scheduler.num_held))
            case ContinueReqInput():
                scheduler.go_on()
                reply(ContinueReqOutput(request_id=message.request_id))
            case RenameWeightsReqInput():
                scheduler.rename_weights(message.version, abort_all=message.abort_all)
                reply(RenameWeightsReqOutput(request_id=message.request_id))
            case _ if isinstance(message, WeightStep | MemoryStep):
                self._weight_updates.handle(message)
            case _ if isinstance(message, WeightInspection | PrefixCopyReq):
                reply(self._look(message))
            case FlushCacheReqInput():
                reply(self._flush_cache(message))
            case GetInternalStateReq():
                reply(self._internal_state(message))
            case StartProfileReqInput() | StopProfileReqInput():
                reply(profile_reply(message.request_id, lambda: self._profile(message)))
            case _:
                raise RuntimeError(f"the scheduler got a message that is not for it: {type(message).__name__}")

    def _look(self, message: WeightInspection | PrefixCopyReq) -> WeightInspectionOutput | PrefixCopyOutput:
        """Look at the weights on every rank of the replica, between the same two passes; or at cached prefixes."""
        if isinstance(message, PrefixCopyReq):
            return self._prefixes.handle(message)
        self.scheduler.finish_passes()
        self.scheduler.passes.tell(message)
        return self.scheduler.model_runner.inspector.inspect(message)

    def _flush_cache(self, message: FlushCacheReqInput) -> FlushCacheReqOutput:
        scheduler = self.scheduler
        # Those that wait in a pause hold nothing of the cache.
        is_busy = bool(scheduler.running.admitted()) if scheduler.is_paused else self.has_work
        if is_busy:
            num_running, num_waiting = len(scheduler.running.decoding), len(scheduler.admission.waiting)
            text = f"not flushed: {num_running} requests run and {num_waiting} wait"
            return FlushCacheReqOutput(request_id=message.request_id, success=False, message=text)
        scheduler.flush_caches()
        return FlushCacheReqOutput(request_id=message.request_id, success=True, message="cache flushed")

    def _profile(self, message: StartProfileReqInput | StopProfileReqInput) -> str:
        """Start or end a recording on every rank of the replica, between the same two passes."""
        profiler, tell = self.scheduler.worker.profiler, self.scheduler.passes.tell
        if isinstance(message, StartProfileReqInput):
            text = profiler.start(message)
            tell(message)
            return text
        if profiler.is_recording:
            tell(message)
        return profiler.stop()

    def _internal_state(self, message: GetInternalStateReq) -> GetInternalStateReqOutput:
        scheduler = self.scheduler
        caches, page_size = scheduler.caches, scheduler.config.page_size
        num_pages = sum(cache.allocator.num_pages for cache in caches)
        num_free = sum(cache.allocator.num_free for cache in caches)
        num_cached = sum(cache.tree.num_evictable_pages for cache in caches)
        return GetInternalStateReqOutput(
            request_id=message.request_id,
            num_running_reqs=len(scheduler.running.admitted()),
            num_waiting_reqs=len(scheduler.admission.waiting) + len(scheduler.grammar_queue),
            queue_oldest_s=scheduler.queue_oldest_s,
            num_used_tokens=(num_pages - num_free - num_cached) * page_size,
            num_cached_tokens=num_cached * page_size,
            max_total_num_tokens=num_pages * page_size,
            num_retracted_reqs=scheduler.running.num_retracted,
            last_gen_throughput=scheduler.results.throughput.tokens_per_s(),
            modelexpress=scheduler.model_runner.publisher_stats(),
            linear_states=_linear_states(caches),
            num_given_bytes=scheduler.model_runner.num_given_bytes,
        )


def _linear_states(caches: Sequence[RequestCache]) -> LinearStateStats | None:
    """The sum over attention groups; None where no layer is linear."""
    groups = [cache.states for cache in caches if cache.states is not None]
    if not groups:
        return None
    return LinearStateStats(
        num_slots=sum(group.slots.num_slots for group in groups),
        num_used=sum(group.slots.num_used for group in groups),
        num_snapshots=sum(group.slots.num_snapshots for group in groups),
        num_hits=sum(group.num_hits for group in groups),
        num_evictions=sum(group.slots.num_displaced for group in groups),
    )
