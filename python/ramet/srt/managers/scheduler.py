"""Owns a replica's loop: what comes in, which requests run in which pass, and what becomes of their tokens."""

import logging
import random
import time
from collections.abc import Callable, Iterable, Mapping

from ramet.srt.batch.batch_plan import Pooling
from ramet.srt.configs.model_config import ModelConfig
from ramet.srt.configs.scheduler_config import SchedulerConfig
from ramet.srt.layers.sampler import INVALID_TOKEN
from ramet.srt.managers.admission import Admission
from ramet.srt.managers.batch_planner import BatchPlanner
from ramet.srt.managers.grammar_pool import GrammarPool
from ramet.srt.managers.grammar_queue import GrammarQueue
from ramet.srt.managers.grammar_steps import ChosenToken, GrammarSteps, awaits_token
from ramet.srt.managers.io_struct import (
    AbortReq,
    BatchEmbeddingOutput,
    BatchTokenIDOutput,
    ContinueReqInput,
    ContinueReqOutput,
    FinishReason,
    FlushCacheReqInput,
    FlushCacheReqOutput,
    GetInternalStateReq,
    GetInternalStateReqOutput,
    LoadLoraReqInput,
    Message,
    PauseMode,
    PauseReqInput,
    PauseReqOutput,
    RenameWeightsReqInput,
    RenameWeightsReqOutput,
    RequestOutput,
    StartProfileReqInput,
    StopProfileReqInput,
    TokenizedGenerateReqInput,
    UnloadLoraReqInput,
)
from ramet.srt.managers.lora_desk import LoraDesk
from ramet.srt.managers.lora_slots import LoraSlots
from ramet.srt.managers.passes import FinishedPass, make_passes
from ramet.srt.managers.plan_channel import PlanSender
from ramet.srt.managers.prefix_groups import place_by_prefix
from ramet.srt.managers.rank_profiler import profile_reply
from ramet.srt.managers.schedule_batch import Req, RunningReq, ScheduleBatch
from ramet.srt.managers.schedule_policy import retraction_cost
from ramet.srt.managers.scheduler_channel import SchedulerChannel
from ramet.srt.managers.scheduler_output import (
    OutputProcessor,
    aborted_reason,
    failure_reason,
    make_output,
    pooled_reason,
    refusal,
)
from ramet.srt.managers.throughput import Throughput
from ramet.srt.managers.token_budget import TokenBudget
from ramet.srt.managers.tp_worker import TpModelWorker
from ramet.srt.managers.weight_update_desk import WeightUpdateDesk
from ramet.srt.mem_cache.allocator import PageAllocator, RowAllocator
from ramet.srt.mem_cache.radix_cache import RadixCache
from ramet.srt.mem_cache.request_cache import RequestCache
from ramet.srt.model_executor.model_runner import ModelRunner
from ramet.srt.sampling.constraint import constraint_of
from ramet.srt.sampling.sampling_params import SamplingParams
from ramet.srt.text.tokenizer import Tokenizer
from ramet.srt.weights.update_messages import WeightStep

logger = logging.getLogger(__name__)

IDLE_POLL_S = 1.0
GRAMMAR_POLL_S = 0.001
LOAD_POLL_S = 0.01  # while an adapter is being loaded, or a trainer waited for
MAX_WAIT_S = 0.02  # at a time, so that the end of the process waits no longer
WARM_UP_TOKENS = 8


class Scheduler:
    """Continuous batching: each pass gives running requests a token, and computes chunks of prompts beside them."""

    def __init__(
        self,
        config: SchedulerConfig,
        model_config: ModelConfig,
        model_runner: ModelRunner,
        get_tokenizer: Callable[[], Tokenizer],
        grammar_pool: GrammarPool | None,
        channel: SchedulerChannel,
        plan_sender: PlanSender | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """
        Args:
            get_tokenizer: reads it when first called. A large one takes most of a second and Python's lock, so a start
                does without: it is read for the first stop string, or in the first quiet moment.
            grammar_pool: None refuses constrained output.
            plan_sender: to the replica's other ranks; None if it has only this one.
            clock: gives the time in seconds, by which arrivals are ordered and passes measured.
        """
        parallel = model_runner.parallel
        self.config = config
        self.model_runner = model_runner
        self.get_tokenizer = get_tokenizer
        self.channel = channel
        self.worker = TpModelWorker(model_runner)
        self.rows = RowAllocator(config.max_running_requests)
        # One for each attention group: its ranks alone hold the keys and values of its requests.
        self.caches = [self._make_cache(model_config.rope.switch_len) for _ in range(parallel.attn_dp_size)]
        self.grammar_queue = GrammarQueue(grammar_pool)
        self.grammar_steps = GrammarSteps(grammar_pool)
        self._grammar_pool = grammar_pool
        self._is_embedding = model_config.embedding is not None
        # In a pipeline a request gains one token while each stage computes a pass.
        target_s, most_s = config.target_itl_s / parallel.pp_size, config.most_itl_s / parallel.pp_size
        self.budget = TokenBudget(config.prefill_budget, target_s, most_s, model_runner.pass_sizes)
        self.lora_slots = LoraSlots(config.num_lora_slots)
        self.admission = Admission(config, self.caches, self.rows, self.budget, clock, self.lora_slots)
        self.running: list[RunningReq] = []  # those that decode
        self.planner = BatchPlanner(self.rows, self.lora_slots)
        self.passes = make_passes(self.worker, plan_sender, parallel.pp_size, config.overlap, clock)
        self.lora = LoraDesk(model_runner.lora, self.lora_slots, self.caches, self.passes.tell, channel.reply)
        self.output = OutputProcessor(get_tokenizer, model_config.eos_token_ids, config.stream_interval)
        self.throughput = Throughput()
        self.num_retracted = 0
        self.is_paused = False
        self.weight_version = model_runner.weight_version  # by which passes are computed; `switch_weight_version`
        self.weight_updates = WeightUpdateDesk(self, model_runner.versions, self.passes.tell, channel.reply)
        self._seeds = random.Random(config.random_seed)
        self._aborted: list[RunningReq] = []  # to be ended before the next pass is planned

    def _make_cache(self, switch_len: int | None) -> RequestCache:
        page_size = self.config.page_size
        allocator = PageAllocator(self.model_runner.max_total_num_tokens // page_size)
        tree = RadixCache(allocator, page_size, self.config.disable_radix_cache)
        return RequestCache(self.rows, allocator, tree, page_size, switch_len)

    # -- The loop

    def run_once(self) -> None:
        """Take messages in, waiting for the first while there is nothing to do or time to do it, and take a step."""
        is_idle, spare_s = not self._can_go_on, self._spare_s()
        idle_s = LOAD_POLL_S if self.lora or self.weight_updates.is_joining else IDLE_POLL_S
        messages = self.channel.receive(idle_s if is_idle else spare_s)
        for message in messages:
            self.handle(message)
        if spare_s:
            return  # to look at the time anew
        if is_idle and not messages and not self.has_work:
            self.get_tokenizer()
            self.model_runner.use_quiet_moment()
        if self.step() is None:
            if not self.has_work:
                self.check_caches()
            elif not self.passes:
                self.grammar_steps.poll(GRAMMAR_POLL_S)  # nothing else is to do

    def _spare_s(self) -> float:
        """Seconds for which the next pass need not be planned; not while what constraints say is to be taken in."""
        return 0.0 if self.grammar_queue or self.grammar_steps else min(MAX_WAIT_S, self.passes.spare_s())

    def step(self) -> ScheduleBatch | None:
        """Plan the next pass and queue it, and deal with the tokens of those before it. Returns what was queued."""
        self.lora.poll()
        self.weight_updates.poll()
        if self.grammar_queue or self.grammar_steps:
            self.grammar_steps.poll(0.0)
            self._collect_grammars()
            self._collect_tokens()
        self.passes.begin_planning()
        batch = self._next_batch() if self.passes.has_room else None
        if batch is not None:
            self._launch(batch)
        for finished in self.passes.results(has_launched=batch is not None):
            self._finish(finished)
        return batch

    def _settle(self) -> None:
        """Deal with the tokens that must be known before anything is planned that depends on them."""
        for finished in self.passes.settle():
            self._finish(finished)

    @property
    def has_work(self) -> bool:
        """Whether any request waits or runs, or a pass is under way."""
        has_reqs = bool(self.running or self.admission or self.grammar_queue or self.grammar_steps or self.passes)
        return has_reqs or self.weight_updates.is_busy

    @property
    def _can_go_on(self) -> bool:
        """Whether anything is to be done before the next message; in a pause, that is little."""
        if not self.is_paused:
            return self.has_work
        has_steps = bool(self.passes or self.grammar_queue or self.grammar_steps or self._aborted)
        return has_steps or self.weight_updates.is_busy

    def check_caches(self) -> None:
        """Assert, while nothing runs, that no page is lost."""
        for cache in self.caches:
            cache.check([])

    def flush_caches(self) -> None:
        """Drop every cached prefix, while nothing runs."""
        for cache in self.caches:
            cache.flush()

    def warm_up(self) -> None:
        """Run a few tokens through the model, so that the first request doesn't pay for what is made on first use."""
        length = min(WARM_UP_TOKENS, self.model_runner.max_req_len - WARM_UP_TOKENS)
        if length < 1:
            return
        # Drawn with every limit: choosing the best token is a part of that, and the kernel for the limits is compiled.
        params = SamplingParams(
            max_new_tokens=2, temperature=1.0, top_k=2, top_p=0.5, min_p=0.1, ignore_eos=True, sampling_seed=0
        )
        pooling = Pooling() if self._is_embedding else None
        message = TokenizedGenerateReqInput(
            rid="warm-up", input_ids=[0] * length, sampling_params=params, pooling=pooling
        )
        req = Req(message, 0)
        req.is_silent = True
        self.admission.put(req)
        while self.has_work:
            self.step()
        self.budget.forget()
        self.flush_caches()

    def close(self) -> None:
        """End the processes that compute constraints."""
        if self._grammar_pool is not None:
            self._grammar_pool.close()

    # -- Standing still

    def pause(self, mode: PauseMode) -> None:
        """Finish the passes under way, and plan no other until `go_on`. Requests that come meanwhile wait.

        Args:
            mode: what becomes of the requests that run or wait, or that an earlier pause holds. "abort": they end.
                "retract": they give their KV cache back, and start over from their tokens when the pause ends.
                "in_place": they keep it, and go on then.
        """
        self.is_paused = True
        self.finish_passes()
        if mode == "abort":
            self._abort_all()
        elif self._aborted:
            self._drop_aborted()
        if mode == "retract":
            self._park(self.grammar_steps.unparked())
            for running in sorted(self._admitted(), key=lambda one: one.req.arrival_s or 0.0, reverse=True):
                self._release(running)
                self.admission.put_back(running, for_room=False)
            self.running = []

    def go_on(self) -> None:
        """End the pause, if there is one."""
        self.is_paused = False

    # -- Weights

    def finish_passes(self) -> None:
        """Wait for every pass under way, and deal with its tokens: the ranks are at rest until the next is planned."""
        for finished in self.passes.drain():
            self._finish(finished)

    def rename_weights(self, version: str, *, abort_all: bool) -> None:
        """The same weights go by another version's name."""
        self.finish_passes()
        if abort_all:
            self._abort_all()
        self.switch_weight_version(version)

    def switch_weight_version(self, version: str) -> None:
        """What is computed from now on is of `version`. Between two passes; whoever changes bytes does it before this.

        Passes under way are finished, so that each token counts as of the version that has made it. Requests that run
        go on with their keys and values; no prefix that was cached until now is found again.
        """
        self.finish_passes()
        self.weight_version = version
        for cache in self.caches:
            cache.begin_generation()

    # -- Messages

    def handle(self, message: Message) -> None:
        """Do what a message from the tokenizer manager says.

        Raises:
            RuntimeError: if it is one that is not for the scheduler.
        """
        match message:
            case TokenizedGenerateReqInput():
                self._accept(message)
            case AbortReq():
                self._abort(message)
            case LoadLoraReqInput() | UnloadLoraReqInput():
                self.lora.handle(message)
            case PauseReqInput():
                self.pause(message.mode)
                self.channel.reply(PauseReqOutput(request_id=message.request_id, num_held=self._num_reqs()))
            case ContinueReqInput():
                self.go_on()
                self.channel.reply(ContinueReqOutput(request_id=message.request_id))
            case RenameWeightsReqInput():
                self.rename_weights(message.version, abort_all=message.abort_all)
                self.channel.reply(RenameWeightsReqOutput(request_id=message.request_id))
            case _ if isinstance(message, WeightStep):
                self.weight_updates.handle(message)
            case FlushCacheReqInput():
                self.channel.reply(self._flush_cache(message))
            case GetInternalStateReq():
                self.channel.reply(self._internal_state(message))
            case StartProfileReqInput() | StopProfileReqInput():
                self.channel.reply(profile_reply(message.request_id, lambda: self._profile(message)))
            case _:
                raise RuntimeError(f"the scheduler got a message that is not for it: {type(message).__name__}")

    def _accept(self, message: TokenizedGenerateReqInput) -> None:
        if self.config.low_priority_values_first:
            message.priority = -message.priority
        params, prompt_len, max_len = message.sampling_params, len(message.input_ids), self.model_runner.max_req_len
        seed = self._seeds.getrandbits(63) if params.sampling_seed is None else params.sampling_seed
        max_queued = self.config.max_queued_requests
        if prompt_len == 0:
            self._refuse(message, "the prompt is empty", 400)
        elif prompt_len > max_len - (message.pooling is None):
            text = f"the prompt has {prompt_len} tokens; the context of {max_len} has no room for it"
            self._refuse(message, text, 400)
        elif len(self.admission.waiting) + len(self.grammar_queue) >= max_queued:
            self._refuse(message, f"the queue is full ({max_queued} requests wait)", 503)
        else:
            if message.pooling is None:
                params.max_new_tokens = min(params.max_new_tokens, max_len - prompt_len)
            self._enqueue(message, seed)

    def _enqueue(self, message: TokenizedGenerateReqInput, seed: int) -> None:
        params = message.sampling_params
        group = self.admission.least_busy_group([*(req.group for req in self.running), *self.grammar_queue.groups()])
        try:
            constraint = constraint_of(params, message.grammar_before)
            if constraint is None:
                self.admission.put(Req(message, seed, group))
            else:
                self.grammar_queue.put(message, constraint, seed, group)
        except ValueError as error:
            self._refuse(message, str(error), 400)

    def _refuse(self, message: TokenizedGenerateReqInput, text: str, status_code: int) -> None:
        self._send([refusal(message, FinishReason(type="abort", message=text, status_code=status_code))])

    def _collect_grammars(self) -> None:
        """Queue the requests whose grammar is compiled."""
        for outcome in self.grammar_queue.collect():
            if isinstance(outcome, Req):
                self.admission.put(outcome)
            else:
                self._send([refusal(outcome.message, failure_reason(outcome.param, outcome.reason))])

    def _abort(self, message: AbortReq) -> None:
        """Waiting requests end at once, running ones before the next pass."""

        def is_meant(rid: str) -> bool:
            return message.abort_all or rid == message.rid

        for req in self.admission.take_out(is_meant):
            req.finish_reason = aborted_reason()
            if req.grammar is not None:
                req.grammar.close()
            self._send([make_output(req)])
        for compiling in self.grammar_queue.take_out(is_meant):
            self._send([refusal(compiling, aborted_reason())])
        self._aborted += [
            running for running in (*self._admitted(), *self.grammar_steps.parked()) if is_meant(running.req.rid)
        ]

    def _abort_all(self) -> None:
        """End every request now."""
        self._abort(AbortReq(abort_all=True))
        self._drop_aborted()

    def _flush_cache(self, message: FlushCacheReqInput) -> FlushCacheReqOutput:
        # Those that wait in a pause hold nothing of the cache.
        is_busy = bool(self._admitted()) if self.is_paused else self.has_work
        if is_busy:
            text = f"not flushed: {len(self.running)} requests run and {len(self.admission.waiting)} wait"
            return FlushCacheReqOutput(request_id=message.request_id, success=False, message=text)
        self.flush_caches()
        return FlushCacheReqOutput(request_id=message.request_id, success=True, message="cache flushed")

    def _profile(self, message: StartProfileReqInput | StopProfileReqInput) -> str:
        """Start or end a recording on every rank of the replica, between the same two passes."""
        profiler = self.worker.profiler
        if isinstance(message, StartProfileReqInput):
            text = profiler.start(message)
            self.passes.tell(message)
            return text
        if profiler.is_recording:
            self.passes.tell(message)
        return profiler.stop()

    def _internal_state(self, message: GetInternalStateReq) -> GetInternalStateReqOutput:
        page_size = self.config.page_size
        num_pages = sum(cache.allocator.num_pages for cache in self.caches)
        num_free = sum(cache.allocator.num_free for cache in self.caches)
        num_cached = sum(cache.tree.num_evictable_pages for cache in self.caches)
        return GetInternalStateReqOutput(
            request_id=message.request_id,
            num_running_reqs=len(self._admitted()),
            num_waiting_reqs=len(self.admission.waiting) + len(self.grammar_queue),
            num_used_tokens=(num_pages - num_free - num_cached) * page_size,
            num_cached_tokens=num_cached * page_size,
            max_total_num_tokens=num_pages * page_size,
            num_retracted_reqs=self.num_retracted,
            last_gen_throughput=self.throughput.tokens_per_s(),
            modelexpress=self.model_runner.publisher_stats(),
        )

    def _num_reqs(self) -> int:
        parked = self.grammar_steps.parked()  # the others with a token that a constraint has yet to take run
        return len(self._admitted()) + len(self.admission.waiting) + len(self.grammar_queue) + len(parked)

    def load(self) -> float:
        """How busy the replica is: requests over those that can run, at most 1. Any thread may ask."""
        return min(1.0, self.num_unfinished / self.config.max_running_requests)

    @property
    def num_unfinished(self) -> int:
        """Requests that run or wait."""
        return len(self.running) + len(self.admission) + len(self.grammar_queue)

    # -- What runs next

    def _next_batch(self) -> ScheduleBatch | None:
        """All requests that can decode now, and the prompt chunks that the budget leaves room for."""
        if awaits_token(self.running):
            self._settle()  # what may come next depends on the last tokens
        if self.grammar_steps:
            self.grammar_steps.wait()
            self._collect_tokens()
        if self._aborted:
            self._drop_aborted()
        if self.is_paused:
            return None
        decoding = self._next_decoding()
        chunks = self.admission.next_chunks(self.running, len(decoding))
        if not chunks and self.admission.waiting and self._park_slow():
            chunks = self.admission.next_chunks(self.running, len(decoding))
        return ScheduleBatch(decoding, chunks, self.weight_version) if decoding or chunks else None

    def _park_slow(self) -> bool:
        """Have requests whose constraint takes its time make room for those that wait; whether there are any."""
        slow = self.grammar_steps.slow()
        self._park(slow)
        return bool(slow)

    def _park(self, reqs: Iterable[RunningReq]) -> None:
        for running in reqs:
            self._release(running)
            running.is_parked = True
            self.running.remove(running)

    def _admitted(self) -> list[RunningReq]:
        """Every request that holds KV cache."""
        return [*self.running, *self.admission.in_progress]

    def _drop_aborted(self) -> None:
        """End the requests that were aborted while they ran, but for those that have ended by themselves."""
        self._settle()
        ended: list[Req] = []
        for running in self._aborted:
            if running.req.finish_reason is None:
                running.req.finish_reason = aborted_reason()
                self.admission.drop(running)
                self.grammar_steps.drop(running)
                self._end(running)
                ended.append(running.req)
        self._aborted.clear()
        self._drop_ended()
        self._send_news(ended)

    def _next_decoding(self) -> list[RunningReq]:
        """The running requests that can gain a token now, with room for it."""
        reqs = self.passes.decodable(self.running)
        if any(self._must_start_over(running) for running in reqs):
            self._settle()  # the tokens may end requests; if not, they must be known
            for running in [one for one in self.running if one.num_pending == 0 and self._must_start_over(one)]:
                self._put_back(running, for_room=False)
            reqs = [one for one in self.passes.decodable(self.running) if not self._must_start_over(one)]
        if not all(self._extend(running) for running in reqs):
            self._settle()  # the tokens may end requests; if not, they must be known where one is to start over
            reqs = self._retract_for(self.passes.decodable(self.running))
        if reqs:
            self.admission.reserve.decay()
        placed = place_by_prefix(reqs, self.caches)
        # Side by side the tokens of an adapter read its matrices once.
        return sorted(placed, key=lambda running: running.lora_slot) if self.lora_slots.num_slots else placed

    def _must_start_over(self, running: RunningReq) -> bool:
        """Whether the request's next token is of a sequence whose keys are others than it has."""
        return self.caches[running.group].must_start_over(running.handle, running.seq_len)

    def _extend(self, running: RunningReq) -> bool:
        """Give a request room for its next token; False if there is none."""
        return self.caches[running.group].extend(running.handle, running.seq_len)

    def _retract_for(self, reqs: list[RunningReq]) -> list[RunningReq]:
        """Those of `reqs` that have room for their next token, once others have given theirs."""
        retracted: set[RunningReq] = set()
        for running in reqs:
            while running not in retracted and not self._extend(running):
                cache = self.caches[running.group]
                victim = min(self._retractable(running.group), key=lambda other: retraction_cost(other, cache))
                self._retract(victim)
                retracted.add(victim)
        return [running for running in reqs if running not in retracted]

    def _retractable(self, group: int) -> list[RunningReq]:
        """Who can start over: all of its tokens are known, and no log-probabilities of its prompt would come twice."""
        return [
            running
            for running in self._admitted()
            if running.group == group
            and running.num_pending == 0
            and (running.req.output_ids or not running.req.wants_input_logprobs)
        ]

    def _retract(self, running: RunningReq) -> None:
        """Take a request's cache away; it starts over from its tokens when there is room."""
        self._put_back(running, for_room=True)
        self.num_retracted += 1
        logger.info(
            "KV cache full: retracted request %s after %d output tokens", running.req.rid, len(running.req.output_ids)
        )

    def _put_back(self, running: RunningReq, *, for_room: bool) -> None:
        """Have a request start over from its tokens."""
        self._release(running)
        if running in self.running:
            self.running.remove(running)
        self.admission.put_back(running, for_room=for_room)

    # -- A pass and its results

    def _launch(self, batch: ScheduleBatch) -> None:
        """Queue a pass on every rank of the replica.

        The ranks run passes in their order, so from here on the cache holds what this one computes for those after it.
        """
        self.passes.launch(batch, self.planner.plan(batch))
        for running in batch.reqs:
            running.handle.kv_len += running.extend_len
        for running in batch.chunks:
            self.caches[running.group].share(running.handle, running.req.fill_ids)
        self.running += [running for running in batch.chunks if running.missing_len == 0]
        for running in (*batch.sampled_reqs, *batch.pooled_reqs):
            running.num_pending += 1

    def _finish(self, finished: FinishedPass) -> None:
        """Give what a pass has made to its requests: tokens, log-probabilities, vectors. End those that are done.

        A request that has ended since the pass was queued drops its token.
        """
        batch, result = finished.batch, finished.result
        self.budget.observe(finished.seconds, batch.num_prompt_tokens)
        if result.prompt_logprobs:
            for running, sequence in zip(batch.reqs, finished.plan.sequences, strict=True):
                if (rows := result.prompt_logprobs.get(running.req.rid)) is not None:
                    running.req.logprobs.add_prompt(sequence.logprob_targets, rows)
        chosen = [
            ChosenToken(running, token_id, result.output_logprobs.get(running.req.rid), batch.weight_version)
            for running, token_id in zip(batch.sampled_reqs, result.token_ids, strict=True)
        ]
        self._take_tokens([one for one in chosen if not self._is_for_grammar(one)])
        if batch.pooled_reqs:
            self._take_vectors(batch, result.vectors)

    def _is_for_grammar(self, chosen: ChosenToken) -> bool:
        """Whether a constraint has to take the token first, which is told of it then."""
        req = chosen.running.req
        if req.grammar is None or req.finish_reason is not None or chosen.token_id == INVALID_TOKEN:
            return False
        if req.sampling_params.max_new_tokens == 0:
            return False
        self.grammar_steps.begin(chosen)
        return True

    def _collect_tokens(self) -> None:
        """Give requests the tokens that their constraints have taken."""
        if chosen := self.grammar_steps.collect():
            self._take_tokens(chosen)

    def _take_tokens(self, tokens: list[ChosenToken]) -> None:
        gaining: list[Req] = []
        for chosen in tokens:
            running, req = chosen.running, chosen.running.req
            running.num_pending -= 1
            if req.finish_reason is None:
                self._take_token(req, chosen)
                if req.finish_reason is not None:
                    self._end(running)
                elif running.is_parked:
                    self.admission.put(req)
                gaining.append(req)
        self._drop_ended()
        self.throughput.add(len(gaining))
        self._send_news(gaining)

    def _take_vectors(self, batch: ScheduleBatch, vectors: Mapping[str, bytes]) -> None:
        """End the requests whose vectors a pass has given."""
        ended: list[Req] = []
        for running in batch.pooled_reqs:
            running.num_pending -= 1
            req = running.req
            if req.finish_reason is None:
                req.note_version(batch.weight_version)
                req.vector = vectors[req.rid]
                req.finish_reason = pooled_reason(req.vector)
                self._end(running)
                ended.append(req)
        self._drop_ended()
        self._send_news(ended)

    def _take_token(self, req: Req, chosen: ChosenToken) -> None:
        req.note_version(chosen.weight_version)
        if req.sampling_params.max_new_tokens == 0:  # nobody wants a token: the prompt has been computed
            req.finish_reason = FinishReason(type="length", length=0)
            return
        if chosen.token_id == INVALID_TOKEN:
            req.finish_reason = self.output.no_token_reason(req)
            return
        self.output.append_token(req, chosen.token_id)
        if req.return_logprob:
            assert chosen.logprobs is not None
            req.logprobs.add_output(chosen.token_id, chosen.logprobs)

    def _end(self, running: RunningReq) -> None:
        """Take back what a request holds that has ended."""
        if not running.is_parked:
            self._release(running)
        if running.req.grammar is not None:
            running.req.grammar.close()

    def _release(self, running: RunningReq) -> None:
        """Take back what a request that stops running holds, here and on the ranks."""
        self.caches[running.group].release(running.handle, running.req.fill_ids)
        self.lora_slots.give_back(running.req.lora_id)
        self.planner.forget(running.req.rid)

    def _drop_ended(self) -> None:
        self.running = [running for running in self.running if running.req.finish_reason is None]

    def _send_news(self, reqs: Iterable[Req]) -> None:
        """Send what it is time to send of what the requests have gained."""
        outputs = (self.output.collect(req) for req in reqs if not req.is_silent)
        self._send([output for output in outputs if output is not None])

    def _send(self, outputs: list[RequestOutput]) -> None:
        """To the detokenizer; those without text straight to the tokenizer manager."""
        if tokens := [output for output in outputs if not output.is_pooled]:
            self.channel.send(BatchTokenIDOutput(outputs=tokens))
        if pooled := [output for output in outputs if output.is_pooled]:
            self.channel.reply(BatchEmbeddingOutput(outputs=pooled))
