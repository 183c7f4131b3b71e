"""Owns which of a replica's requests run in which pass, and when none does."""

import time
from collections.abc import Callable

from ramet.srt.batch.batch_plan import Pooling
from ramet.srt.configs.model_config import ModelConfig
from ramet.srt.configs.scheduler_config import SchedulerConfig
from ramet.srt.managers.admission import Admission
from ramet.srt.managers.batch_planner import BatchPlanner
from ramet.srt.managers.grammar_pool import GrammarPool
from ramet.srt.managers.grammar_queue import GrammarQueue
from ramet.srt.managers.grammar_steps import GrammarSteps, awaits_token
from ramet.srt.managers.io_struct import AbortReq, PauseMode, TokenizedGenerateReqInput
from ramet.srt.managers.lora_slots import LoraSlots
from ramet.srt.managers.pass_results import PassResults
from ramet.srt.managers.passes import make_passes
from ramet.srt.managers.plan_channel import PlanSender
from ramet.srt.managers.prefix_groups import place_by_prefix
from ramet.srt.managers.request_intake import RequestIntake
from ramet.srt.managers.running_requests import RunningRequests
from ramet.srt.managers.schedule_batch import Req, RunningReq, ScheduleBatch
from ramet.srt.managers.scheduler_channel import SchedulerChannel
from ramet.srt.managers.scheduler_output import OutputProcessor, OutputSender, aborted_reason, make_output, refusal
from ramet.srt.managers.token_budget import TokenBudget
from ramet.srt.managers.tp_worker import TpModelWorker
from ramet.srt.mem_cache.allocator import PageAllocator, RowAllocator
from ramet.srt.mem_cache.prefix_states import PrefixStates
from ramet.srt.mem_cache.radix_cache import RadixCache
from ramet.srt.mem_cache.request_cache import RequestCache
from ramet.srt.mem_cache.window_pages import WindowedPageAllocator, WindowPages
from ramet.srt.model_executor.model_runner import ModelRunner
from ramet.srt.sampling.sampling_params import SamplingParams
from ramet.srt.text.tokenizer import Tokenizer

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
            channel: where outputs go.
            plan_sender: to the replica's other ranks; None if it has only this one.
            clock: gives the time in seconds, by which arrivals are ordered and passes measured.
        """
        parallel = model_runner.parallel
        self.config = config
        self._clock = clock
        self.model_runner = model_runner
        self.get_tokenizer = get_tokenizer
        self.worker = TpModelWorker(model_runner)
        self.rows = RowAllocator(config.max_running_requests)
        # One for each attention group: its ranks alone hold the keys and values of its requests.
        self.caches = [self._make_cache(model_config.rope.switch_len) for _ in range(parallel.attn_dp_size)]
        self.grammar_queue = GrammarQueue(grammar_pool)
        self.grammar_steps = GrammarSteps(grammar_pool)
        self._grammar_pool = grammar_pool
        self._is_embedding = model_config.embedding is not None
        self._cache_has_scales = model_config.has_fp8_cache and model_config.has_cache_scales  # which weights bring
        # In a pipeline a request gains one token while each stage computes a pass.
        target_s, most_s = config.target_itl_s / parallel.pp_size, config.most_itl_s / parallel.pp_size
        self.budget = TokenBudget(config.prefill_budget, target_s, most_s, model_runner.pass_sizes)
        self.lora_slots = LoraSlots(config.num_lora_slots)
        self.admission = Admission(config, self.caches, self.rows, self.budget, clock, self.lora_slots)
        self.planner = BatchPlanner(self.rows, self.lora_slots, self.caches)
        self.running = RunningRequests(self.caches, self.admission, self.lora_slots, self.planner)
        self.passes = make_passes(self.worker, plan_sender, parallel.pp_size, config.overlap, clock)
        processor = OutputProcessor(get_tokenizer, model_config.eos_token_ids, config.stream_interval)
        self._sender = OutputSender(processor, channel)
        self.results = PassResults(self.running, self.admission, self.grammar_steps, self.budget, self._sender, clock)
        self.intake = RequestIntake(
            config, model_runner.max_req_len, self.running, self.admission, self.grammar_queue, self._sender, clock
        )
        self.is_paused = False
        self.weight_version = model_runner.weight_version  # by which passes are computed; `switch_weight_version`
        self._aborted: list[RunningReq] = []  # to be ended before the next pass is planned

    def _make_cache(self, switch_len: int | None) -> RequestCache:
        page_size = self.config.page_size
        num_pages = self.model_runner.max_total_num_tokens // page_size
        windows, allocator = None, PageAllocator(num_pages)
        if self.model_runner.windows is not None:
            windows = WindowPages(self.model_runner.windows, num_pages, page_size)
            allocator = WindowedPageAllocator(num_pages, windows)
        tree = RadixCache(allocator, page_size, self.config.disable_radix_cache)
        states = None
        if self.model_runner.num_state_slots:
            states = PrefixStates(self.model_runner.num_state_slots, tree, page_size)
        return RequestCache(self.rows, allocator, tree, page_size, switch_len, windows, states)

    # -- A step

    def spare_s(self) -> float:
        """Seconds for which the next pass need not be planned; not while what constraints say is to be taken in."""
        return 0.0 if self.grammar_queue or self.grammar_steps else min(MAX_WAIT_S, self.passes.spare_s())

    def step(self) -> ScheduleBatch | None:
        """Plan the next pass and queue it, and deal with the tokens of those before it. Returns what was queued."""
        if self.grammar_queue or self.grammar_steps:
            self.grammar_steps.poll(0.0)
            self.intake.collect_grammars()
            self.results.collect_tokens()
        self.passes.begin_planning()
        batch = self._next_batch() if self.passes.has_room else None
        if batch is not None:
            self.passes.launch(batch, self.planner.plan(batch))
            self.running.note_launched(batch)
        for finished in self.passes.results(has_launched=batch is not None):
            self.results.take(finished)
        return batch

    def _settle(self) -> None:
        """Deal with the tokens that must be known before anything is planned that depends on them."""
        for finished in self.passes.settle():
            self.results.take(finished)

    @property
    def has_work(self) -> bool:
        """Whether any request waits or runs, or a pass is under way."""
        return bool(self.running.decoding or self.admission or self.grammar_queue or self.grammar_steps or self.passes)

    @property
    def can_go_on(self) -> bool:
        """Whether anything is to be done before the next message; in a pause, that is little."""
        if not self.is_paused:
            return self.has_work
        return bool(self.passes or self.grammar_queue or self.grammar_steps or self._aborted)

    @property
    def num_unfinished(self) -> int:
        """Requests that run or wait."""
        return len(self.running.decoding) + len(self.admission) + len(self.grammar_queue)

    @property
    def queue_oldest_s(self) -> float:
        """Seconds for which the request has waited that has waited longest; 0.0 if none waits."""
        return self.admission.oldest_wait_s(self.grammar_queue.since_s())

    def load(self) -> float:
        """How busy the replica is: requests over those that can run, at most 1. Any thread may ask."""
        return min(1.0, self.num_unfinished / self.config.max_running_requests)

    def use_quiet_moment(self) -> None:
        """Do, while nothing runs or waits, what would keep requests waiting."""
        self.get_tokenizer()
        self.model_runner.use_quiet_moment()

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
            self._retract_all()

    def _retract_all(self) -> None:
        """Have every request that runs give its KV cache back, and start over from its tokens. Between two passes."""
        self.running.park(self.grammar_steps.unparked())
        for running in sorted(self.running.admitted(), key=lambda one: one.req.arrival_s or 0.0, reverse=True):
            self.running.put_back(running, for_room=False)

    def go_on(self) -> None:
        """End the pause, if there is one."""
        self.is_paused = False

    def give_up_caches(self) -> bool:
        """Drop every cached prefix, in a pause in which no request holds keys and values; False if one does."""
        if not self.is_paused or self.running.admitted():
            return False
        self.flush_caches()
        return True

    @property
    def num_held(self) -> int:
        """Requests that run or wait, those included that have given their cache back."""
        parked = self.grammar_steps.parked()  # the others with a token that a constraint has yet to take run
        return len(self.running.admitted()) + len(self.admission.waiting) + len(self.grammar_queue) + len(parked)

    # -- Weights

    def finish_passes(self) -> None:
        """Wait for every pass under way, and deal with its tokens: the ranks are at rest until the next is planned."""
        for finished in self.passes.drain():
            self.results.take(finished)

    def rename_weights(self, version: str, *, abort_all: bool) -> None:
        """The same weights go by another version's name."""
        self.finish_passes()
        if abort_all:
            self._abort_all()
        self._begin_version(version)

    def switch_weight_version(self, version: str) -> None:
        """What is computed from now on is of `version`. Between two passes; whoever changes bytes does it before this.

        Passes under way are finished, so that each token counts as of the version that has made it. Requests that run
        go on with their keys and values; those start over from their tokens whose keys and values were rounded by
        scales of the weights before. No prefix that was cached until now is found again.
        """
        self.finish_passes()
        if self._cache_has_scales:
            if self._aborted:
                self._drop_aborted()
            self._retract_all()
        self._begin_version(version)

    def _begin_version(self, version: str) -> None:
        self.weight_version = version
        for cache in self.caches:
            cache.begin_generation()

    # -- Aborted requests

    def abort(self, message: AbortReq) -> None:
        """Waiting requests end at once, running ones before the next pass."""

        def is_meant(rid: str) -> bool:
            return message.abort_all or rid == message.rid

        for req in self.admission.take_out(is_meant):
            req.finish_reason = aborted_reason()
            if req.grammar is not None:
                req.grammar.close()
            self._sender.send([make_output(req)])
        for compiling in self.grammar_queue.take_out(is_meant):
            waited_s = self._clock() - compiling.arrival_s
            self._sender.send([refusal(compiling.message, aborted_reason(), waited_s)])
        self._aborted += [
            running for running in (*self.running.admitted(), *self.grammar_steps.parked()) if is_meant(running.req.rid)
        ]

    def _abort_all(self) -> None:
        """End every request now."""
        self.abort(AbortReq(abort_all=True))
        self._drop_aborted()

    def _drop_aborted(self) -> None:
        """End the requests that were aborted while they ran, but for those that have ended by themselves."""
        self._settle()
        ended: list[Req] = []
        for running in self._aborted:
            if running.req.finish_reason is None:
                running.req.finish_reason = aborted_reason()
                self.admission.drop(running)
                self.grammar_steps.drop(running)
                self.running.end(running)
                ended.append(running.req)
        self._aborted.clear()
        self.running.drop_ended()
        self._sender.send_news(ended)

    # -- What runs next

    def _next_batch(self) -> ScheduleBatch | None:
        """All requests that can decode now, and the prompt chunks that the budget leaves room for."""
        if awaits_token(self.running.decoding):
            self._settle()  # what may come next depends on the last tokens
        if self.grammar_steps:
            self.grammar_steps.wait()
            self.results.collect_tokens()
        if self._aborted:
            self._drop_aborted()
        if self.is_paused:
            return None
        decoding = self._next_decoding()
        chunks = self.admission.next_chunks(self.running.decoding, len(decoding))
        if not chunks and self.admission.waiting and self._park_slow():
            chunks = self.admission.next_chunks(self.running.decoding, len(decoding))
        return ScheduleBatch(decoding, chunks, self.weight_version) if decoding or chunks else None

    def _park_slow(self) -> bool:
        """Have requests whose constraint takes its time make room for those that wait; whether there are any."""
        slow = self.grammar_steps.slow()
        self.running.park(slow)
        return bool(slow)

    def _next_decoding(self) -> list[RunningReq]:
        """The running requests that can gain a token now, with room for it."""
        running, decodable = self.running, self.passes.decodable
        reqs = decodable(running.decoding)
        if any(map(running.must_start_over, reqs)):
            self._settle()  # the tokens may end requests; if not, they must be known
            for one in list(running.decoding):
                if one.num_pending == 0 and running.must_start_over(one):
                    running.put_back(one, for_room=False)
            reqs = [one for one in decodable(running.decoding) if not running.must_start_over(one)]
        if not all(map(running.extend, reqs)):
            self._settle()  # the tokens may end requests; if not, they must be known where one is to start over
            reqs = running.make_room(decodable(running.decoding))
        if reqs:
            self.admission.reserve.decay()
        placed = place_by_prefix(reqs, self.caches)
        # Side by side the tokens of an adapter read its matrices once.
        return sorted(placed, key=lambda one: one.lora_slot) if self.lora_slots.num_slots else placed
