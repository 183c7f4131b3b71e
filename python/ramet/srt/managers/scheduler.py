"""Owns one rank's loop: which requests run in which pass, and what becomes of the tokens. One process for each rank."""

import logging
import random
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from ramet.srt.batch.batch_plan import BatchPlan, BatchResult
from ramet.srt.configs.model_config import ModelConfig
from ramet.srt.layers.sampler import INVALID_TOKEN
from ramet.srt.managers.io_struct import (
    AbortReq,
    BatchTokenIDOutput,
    FinishReason,
    FlushCacheReqInput,
    FlushCacheReqOutput,
    GetInternalStateReq,
    GetInternalStateReqOutput,
    Message,
    ProfileReqOutput,
    StartProfileReqInput,
    StopProfileReqInput,
    TokenizedGenerateReqInput,
)
from ramet.srt.managers.plan_channel import PlanSender
from ramet.srt.managers.rank_profiler import FAILURES
from ramet.srt.managers.schedule_batch import Req, ScheduleBatch
from ramet.srt.managers.schedule_policy import PrefillAdder, order_waiting, pick_retracted
from ramet.srt.managers.scheduler_channel import SchedulerChannel
from ramet.srt.managers.scheduler_output import OutputProcessor, abort_output, add_logprobs
from ramet.srt.managers.tp_worker import TpModelWorker
from ramet.srt.mem_cache.allocator import PageAllocator, RowAllocator
from ramet.srt.mem_cache.radix_cache import RadixCache
from ramet.srt.mem_cache.request_cache import RequestCache
from ramet.srt.model_executor.model_runner import ModelRunner
from ramet.srt.sampling.grammar import Grammar, GrammarBackend
from ramet.srt.sampling.sampling_params import SamplingParams
from ramet.srt.server_args import ServerArgs
from ramet.srt.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

IDLE_POLL_S = 1.0
RESULT_POLL_S = 0.05
NEW_TOKEN_RATIO = 0.4  # share of the running requests' remaining tokens that is kept free at admission
NEW_TOKEN_RATIO_STEP = 0.1  # added after a retraction
NEW_TOKEN_RATIO_DECAY = 0.998  # per decode pass
THROUGHPUT_WINDOW_S = 5.0
WARM_UP_TOKENS = 8


@dataclass
class PassUnderWay:
    """A pass that the ranks compute."""

    batch: ScheduleBatch
    plan: BatchPlan
    wait: Callable[[], BatchResult] | None  # for its result; None if another rank sends it
    launched: float  # time.monotonic()


class Scheduler:
    """Continuous batching: waiting requests are prefilled in chunks, running ones gain a token in each decode pass.

    With `overlap`, a pass is planned and queued before the tokens of the one before it are known: the ranks take
    its input from their own memory. What ends a request is seen one pass late, and the token too many is dropped.
    In a pipeline as many passes are under way as there are stages, each for other requests.
    """

    def __init__(
        self,
        server_args: ServerArgs,
        model_config: ModelConfig,
        model_runner: ModelRunner,
        get_tokenizer: Callable[[], Tokenizer],
        grammar_backend: GrammarBackend | None,
        channel: SchedulerChannel,
        plan_sender: PlanSender | None = None,
        overlap: bool = False,
    ):
        """
        Args:
            get_tokenizer: reads it when first called. A large one takes most of a second and Python's lock, so a start
                does without: it is read for the first stop string or constraint, or in the first quiet moment.
        """
        self.plan_sender = plan_sender  # to the replica's other ranks, if it has any
        self.server_args = server_args
        self.model_config = model_config
        self.model_runner = model_runner
        self.get_tokenizer = get_tokenizer
        self.grammar_backend = grammar_backend
        self.channel = channel
        self.page_size = server_args.page_size
        self.worker = TpModelWorker(model_runner)
        self.rows = RowAllocator(server_args.max_running_requests)
        # One for each attention group: its ranks alone hold the keys and values of its requests.
        self.caches = [self._make_cache() for _ in range(model_runner.parallel.attn_dp_size)]
        self.output = OutputProcessor(get_tokenizer, model_config.eos_token_ids, server_args.stream_interval)
        self.waiting: deque[Req] = deque()
        self.running: list[Req] = []
        self.chunked: dict[int, Req] = {}  # by attention group: whose prompt did not fit into the last prefill pass
        self.compiling: list[tuple[Req, Future[Grammar]]] = []
        self.grammar_threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="grammar")
        self.seeds = random.Random(server_args.random_seed)
        self.last_was_prefill = False
        self.new_token_ratio = NEW_TOKEN_RATIO
        self.num_retracted = 0
        self.overlap = overlap
        self.is_pipeline = model_runner.parallel.pp_size > 1
        self.under_way: deque[PassUnderWay] = deque()  # oldest first
        self.max_under_way = max(2, model_runner.parallel.pp_size)  # so many keep every pipeline stage busy
        self._token_times: deque[tuple[float, int]] = deque()
        self.sampling_rids: set[str] = set()  # requests whose sampling state the ranks hold
        self.ended_rids: list[str] = []  # those of them that the ranks may forget

    def _make_cache(self) -> RequestCache:
        allocator = PageAllocator(self.model_runner.max_total_num_tokens // self.page_size)
        tree = RadixCache(allocator, self.page_size, self.server_args.disable_radix_cache)
        return RequestCache(self.rows, allocator, tree, self.page_size)

    # -- The loop

    def run_once(self) -> None:
        """Take messages in, waiting a moment for the first when there is nothing to do, and take one step."""
        is_idle = not self._has_work()
        messages = self.channel.receive(IDLE_POLL_S if is_idle else 0.0)
        for message in messages:
            self._handle(message)
        if is_idle and not messages:
            self.get_tokenizer()
        if self.step() is None:
            if not self._has_work():
                self._check_caches()
            elif not self.under_way and self.compiling:
                time.sleep(0.001)  # a grammar is being compiled and nothing else is to do

    def step(self) -> ScheduleBatch | None:
        """Plan the next pass and queue it, and deal with the tokens of those before it. Returns what was queued."""
        self._collect_grammars()
        batch = self._next_batch() if len(self.under_way) < self.max_under_way else None
        if batch is not None:
            self.under_way.append(self._launch(batch))
        if self.is_pipeline:
            self._take_result(0.0 if batch is not None else RESULT_POLL_S)
        else:
            self._finish_under_way(keep=1 if self.overlap and batch is not None else 0)
        return batch

    def _take_result(self, timeout_s: float) -> None:
        """Deal with the next result that the last pipeline stage sends, if it comes in time."""
        if self.under_way:
            assert self.plan_sender is not None, "a pipeline has more than one rank"
            result = self.plan_sender.receive(timeout_s)
            if result is not None:
                self._finish(self.under_way.popleft(), result)

    def _finish_under_way(self, keep: int = 0) -> None:
        """Wait for the passes under way, but for the newest `keep`, and deal with their tokens."""
        while len(self.under_way) > keep:
            oldest = self.under_way.popleft()
            assert oldest.wait is not None, "without a pipeline the leader samples"
            self._finish(oldest, oldest.wait())

    def _check_caches(self) -> None:
        """Assert, while nothing runs, that no page is lost."""
        for cache in self.caches:
            cache.check([])

    def _has_work(self) -> bool:
        return bool(self.running or self.waiting or self.chunked or self.compiling or self.under_way)

    @property
    def oldest_launch(self) -> float | None:
        """time.monotonic() of the launch of the oldest pass that has not come back; the watchdog reads it."""
        under_way = list(self.under_way)
        return under_way[0].launched if under_way else None

    def warm_up(self) -> None:
        """Run a few tokens through the model, so that the first request doesn't pay for what is made on first use."""
        length = min(WARM_UP_TOKENS, self.model_runner.max_req_len - WARM_UP_TOKENS)
        if length < 1:
            return
        # Drawn with every limit: choosing the best token is a part of that, and the kernel for the limits is compiled.
        params = SamplingParams(
            max_new_tokens=2, temperature=1.0, top_k=2, top_p=0.5, min_p=0.1, ignore_eos=True, sampling_seed=0
        )
        req = Req(TokenizedGenerateReqInput(rid="warm-up", input_ids=[0] * length, sampling_params=params), 0)
        req.is_silent = True
        self.waiting.append(req)
        while self._has_work():
            self.step()
        self._flush_caches()

    def _flush_caches(self) -> None:
        for cache in self.caches:
            cache.flush()

    # -- Messages

    def _handle(self, message: Message) -> None:
        match message:
            case TokenizedGenerateReqInput():
                self._accept(message)
            case AbortReq():
                self._abort(message)
            case FlushCacheReqInput():
                self.channel.reply(self._flush_cache(message))
            case GetInternalStateReq():
                self.channel.reply(self._internal_state(message))
            case StartProfileReqInput() | StopProfileReqInput():
                self.channel.reply(self._profile(message))
            case _:
                raise RuntimeError(f"the scheduler got a message that is not for it: {type(message).__name__}")

    def _accept(self, message: TokenizedGenerateReqInput) -> None:
        seed = message.sampling_params.sampling_seed
        req = Req(message, self.seeds.getrandbits(63) if seed is None else seed)
        req.group = self._least_busy_group()
        params = req.sampling_params
        max_len = self.model_runner.max_req_len
        if not req.origin_input_ids:
            return self._refuse(req, "the prompt is empty", 400)
        if len(req.origin_input_ids) >= max_len:
            text = f"the prompt has {len(req.origin_input_ids)} tokens; at most {max_len - 1} fit with one of output"
            return self._refuse(req, text, 400)
        params.max_new_tokens = min(params.max_new_tokens, max_len - len(req.origin_input_ids))
        if len(self.waiting) >= self.server_args.max_queued_requests:
            return self._refuse(req, f"the queue is full ({self.server_args.max_queued_requests} requests wait)", 503)
        if params.regex or params.json_schema or params.ebnf:
            if self.grammar_backend is None:
                return self._refuse(req, "constrained output is off (--grammar-backend none)", 400)
            self.compiling.append((req, self.grammar_threads.submit(self.grammar_backend.compile, params)))
        else:
            self.waiting.append(req)

    def _refuse(self, req: Req, message: str, status_code: int) -> None:
        self.channel.send(BatchTokenIDOutput(outputs=[abort_output(req, message, status_code)]))

    def _collect_grammars(self) -> None:
        """Queue the requests whose grammar is compiled."""
        still_compiling = []
        for req, future in self.compiling:
            if req.abort_requested:
                self._refuse(req, "aborted", 499)
            elif not future.done():
                still_compiling.append((req, future))
            elif isinstance(error := future.exception(), ValueError):
                self._refuse(req, str(error), 400)
            else:
                req.grammar = future.result()
                self.waiting.append(req)
        self.compiling = still_compiling

    def _abort(self, message: AbortReq) -> None:
        """Waiting requests end at once, running ones with the next pass."""
        for req in [*self.waiting, *self._admitted(), *(req for req, _ in self.compiling)]:
            if message.abort_all or req.rid == message.rid:
                req.abort_requested = True
        for req in [req for req in self.waiting if req.abort_requested]:
            self.waiting.remove(req)
            self._refuse(req, "aborted", 499)

    def _flush_cache(self, message: FlushCacheReqInput) -> FlushCacheReqOutput:
        if self._has_work():
            text = f"not flushed: {len(self.running)} requests run and {len(self.waiting)} wait"
            return FlushCacheReqOutput(request_id=message.request_id, success=False, message=text)
        self._flush_caches()
        return FlushCacheReqOutput(request_id=message.request_id, success=True, message="cache flushed")

    def _profile(self, message: StartProfileReqInput | StopProfileReqInput) -> ProfileReqOutput:
        """Start or end a recording on every rank of the replica, between the same two passes."""
        profiler, is_start = self.worker.profiler, isinstance(message, StartProfileReqInput)
        try:
            text = profiler.start(message) if is_start else ""
            if self.plan_sender is not None and profiler.is_recording:
                self.plan_sender.send(message)
            return ProfileReqOutput(request_id=message.request_id, success=True, message=text or profiler.stop())
        except FAILURES as error:
            logger.warning("not profiled: %s", error)
            return ProfileReqOutput(request_id=message.request_id, success=False, message=str(error))

    def _internal_state(self, message: GetInternalStateReq) -> GetInternalStateReqOutput:
        num_pages = sum(cache.allocator.num_pages for cache in self.caches)
        num_free = sum(cache.allocator.num_free for cache in self.caches)
        num_cached = sum(cache.tree.num_evictable_pages for cache in self.caches)
        return GetInternalStateReqOutput(
            request_id=message.request_id,
            num_running_reqs=len(self._admitted()),
            num_waiting_reqs=len(self.waiting) + len(self.compiling),
            num_used_tokens=(num_pages - num_free - num_cached) * self.page_size,
            num_cached_tokens=num_cached * self.page_size,
            max_total_num_tokens=num_pages * self.page_size,
            num_retracted_reqs=self.num_retracted,
            last_gen_throughput=self._throughput(),
            modelexpress=self.model_runner.publisher_stats(),
        )

    def load(self) -> float:
        """How busy the replica is: requests over those that can run, at most 1. Any thread may ask."""
        num_reqs = len(self.running) + len(self.chunked) + len(self.waiting) + len(self.compiling)
        return min(1.0, num_reqs / self.server_args.max_running_requests)

    def _throughput(self) -> float:
        """Output tokens per second over the last few seconds."""
        self._forget_old_passes()
        return sum(count for _, count in self._token_times) / THROUGHPUT_WINDOW_S

    def _forget_old_passes(self) -> None:
        start = time.monotonic() - THROUGHPUT_WINDOW_S
        while self._token_times and self._token_times[0][0] < start:
            self._token_times.popleft()

    # -- What runs next

    def _next_batch(self) -> ScheduleBatch | None:
        """Prefill and decode passes alternate while there is work for both, so that neither starves the other."""
        if not self.is_pipeline and any(req.grammar is not None for req in self.running):
            self._finish_under_way()  # the next tokens' grammar masks depend on the last ones
        self._drop_aborted()
        if not (self.last_was_prefill and self.running):
            batch = self._prefill_batch()
            if batch is not None:
                self.last_was_prefill = True
                return batch
        self.last_was_prefill = False
        return self._decode_batch()

    def _drop_aborted(self) -> None:
        if not any(req.abort_requested for req in self._admitted()):
            return
        if not self.is_pipeline:
            self._finish_under_way()
        ended = [req for req in self._admitted() if req.abort_requested]
        for req in ended:
            req.finish_reason = FinishReason(type="abort", message="aborted", status_code=499)
            self._release(req)
        self.chunked = {group: req for group, req in self.chunked.items() if not req.abort_requested}
        self.running = [req for req in self.running if not req.abort_requested]
        self._send(ended)

    def _admitted(self) -> list[Req]:
        """Every request that holds KV cache."""
        return [*self.running, *self.chunked.values()]

    def _prefill_batch(self) -> ScheduleBatch | None:
        if not self.waiting and not self.chunked:
            return None
        reqs = [req for group in range(len(self.caches)) for req in self._prefill_reqs(group)]
        return ScheduleBatch.for_extend(reqs) if reqs else None

    def _prefill_reqs(self, group: int) -> list[Req]:
        """The requests of one attention group that the next pass prefills, or a chunk of them."""
        cache = self.caches[group]
        chunk = self.server_args.chunked_prefill_size
        adder = PrefillAdder(
            cache,
            None if chunk == -1 else chunk,
            self._reserve_pages(group),
            self.server_args.max_running_requests - len(self._admitted()),
        )
        chunked = self.chunked.pop(group, None)
        if chunked is not None:
            adder.add_chunked(chunked)
        queue = [req for req in self.waiting if req.group == group]
        order_waiting(queue, cache, self.server_args.schedule_policy)
        for req in queue:
            if adder.shares_uncached_prefix(req):
                continue
            if not adder.add(req):
                break
            self.waiting.remove(req)
        if adder.chunked_req is not None:
            self.chunked[group] = adder.chunked_req
        return adder.reqs

    def _reserve_pages(self, group: int) -> int:
        """Pages that admission leaves for the tokens which running requests will still make."""
        running = [req for req in self.running if req.group == group]
        tokens = sum(req.num_remaining_tokens for req in running) * self.new_token_ratio
        return self.caches[group].num_pages(int(tokens)) + len(running)

    def _least_busy_group(self) -> int:
        """The attention group with the fewest requests; a request stays in its group."""
        loads = [0] * len(self.caches)
        for req in [*self.waiting, *self._admitted(), *(req for req, _ in self.compiling)]:
            loads[req.group] += 1
        return loads.index(min(loads))

    def _decode_batch(self) -> ScheduleBatch | None:
        """The running requests that can gain a token now; in a pipeline, one micro-batch of them."""
        if self.is_pipeline:
            ready = [req for req in self.running if req.num_pending == 0]
            candidates = deque(ready[: -(-len(self.running) // self.max_under_way)])
        else:  # the others end with the pass under way
            candidates = deque(req for req in self.running if req.num_remaining_tokens > 0)
        batch: list[Req] = []
        while candidates:
            req = candidates.popleft()
            while not self.caches[req.group].extend(req.handle, req.seq_len):
                if self.under_way and not self.is_pipeline:
                    self._finish_under_way()  # its tokens may end requests; if not, they must be known to start over
                    return self._decode_batch()
                victim = pick_retracted(
                    [other for other in self.running if other.num_pending == 0 and other.group == req.group]
                )
                self._retract(victim)
                if victim is req:
                    break
                for others in (batch, candidates):
                    if victim in others:
                        others.remove(victim)
            else:
                batch.append(req)
        self.new_token_ratio = max(0.1, self.new_token_ratio * NEW_TOKEN_RATIO_DECAY)
        batch.sort(key=lambda req: req.group)  # each attention group's tokens stand together
        return ScheduleBatch.for_decode(batch) if batch else None

    def _retract(self, req: Req) -> None:
        """Take a running request's cache away; it starts over from its tokens when there is room."""
        self._release(req)
        self.running.remove(req)
        self.waiting.appendleft(req)
        self.num_retracted += 1
        self.new_token_ratio = min(1.0, self.new_token_ratio + NEW_TOKEN_RATIO_STEP)
        logger.info("KV cache full: retracted request %s after %d output tokens", req.rid, len(req.output_ids))

    # -- A pass and its results

    def _launch(self, batch: ScheduleBatch) -> PassUnderWay:
        """Queue a pass on every rank of the replica; the ranks run passes in the order in which they are queued.

        So from here on the cache holds what the pass computes, for every pass after it.
        """
        plan = self._plan(batch)
        launched = time.monotonic()
        if self.plan_sender is not None:
            self.plan_sender.send(plan)
        wait = self.worker.launch(plan)
        for req in batch.reqs:
            req.handle.kv_len += req.extend_len
            if not batch.is_decode:
                self.caches[req.group].share(req.handle, req.fill_ids)
        for req in batch.sampled_reqs:
            req.num_pending += 1
        if not batch.is_decode:
            self.running += batch.sampled_reqs
        return PassUnderWay(batch, plan, wait, launched)

    def _plan(self, batch: ScheduleBatch) -> BatchPlan:
        new_states = [req.sampling_state() for req in batch.sampled_reqs if req.rid not in self.sampling_rids]
        self.sampling_rids.update(state.rid for state in new_states)
        ended, self.ended_rids = self.ended_rids, []
        return batch.to_plan(self.rows.take_writes(), new_states, ended, self.model_config.vocab_size)

    def _finish(self, finished: PassUnderWay, result: BatchResult) -> None:
        """Give the tokens and log-probabilities of a pass to their requests; end and send on those that are done.

        A request that has ended since the pass was queued drops its token.
        """
        for req, sequence in zip(finished.batch.reqs, finished.plan.sequences, strict=True):
            if (rows := result.prompt_logprobs.get(req.rid)) is not None and req.input_logprobs is not None:
                add_logprobs(req.input_logprobs, sequence.logprob_targets, rows)
        gaining: list[Req] = []
        for req, token_id in zip(finished.batch.sampled_reqs, result.token_ids, strict=True):
            req.num_pending -= 1
            if req.finish_reason is None:
                self._take_token(req, token_id, result)
                gaining.append(req)
        self.running = [req for req in self.running if req.finish_reason is None]
        self._token_times.append((time.monotonic(), len(gaining)))
        self._forget_old_passes()
        self._send([req for req in gaining if not req.is_silent])

    def _take_token(self, req: Req, token_id: int, result: BatchResult) -> None:
        if token_id == INVALID_TOKEN:
            message = "the model or the grammar left no token to choose"
            req.finish_reason = FinishReason(type="abort", message=message, status_code=500)
        else:
            self.output.append_token(req, token_id)
            if req.return_logprob:
                add_logprobs(req.output_logprobs, [token_id], result.output_logprobs[req.rid])
        if req.finish_reason is not None:
            self._release(req)

    def _release(self, req: Req) -> None:
        """Take back what a request that stops running holds, here and on the ranks."""
        self.caches[req.group].release(req.handle, req.fill_ids)
        req.handle = None
        if req.rid in self.sampling_rids:
            self.sampling_rids.remove(req.rid)
            self.ended_rids.append(req.rid)

    def _send(self, reqs: list[Req]) -> None:
        outputs = [output for req in reqs if (output := self.output.collect(req)) is not None]
        if outputs:
            self.channel.send(BatchTokenIDOutput(outputs=outputs))
