"""Runs the real scheduler against ranks that only take time, on a clock of the simulation: nothing sleeps.

What a pass takes is said by a formula (`PassTimes`), so a trace of requests shows what the scheduler's decisions do to
first tokens and token times. `Alternating` is the rule that went before, to compare with.
"""

import random
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import torch
from ramet.srt.batch.batch_plan import BatchPlan, BatchResult
from ramet.srt.configs.model_config import ModelConfig
from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.configs.rope_config import RopeConfig
from ramet.srt.configs.scheduler_config import SchedulerConfig
from ramet.srt.managers.io_struct import BatchTokenIDOutput, Message, TokenizedGenerateReqInput
from ramet.srt.managers.passes import make_passes
from ramet.srt.managers.scheduler import Scheduler
from ramet.srt.managers.scheduler_channel import SchedulerChannel
from ramet.srt.managers.scheduler_loop import IDLE_POLL_S, SchedulerLoop
from ramet.srt.managers.tp_worker import TpModelWorker
from ramet.srt.model_executor.cuda_graph_runner import CHUNK_SIZES
from ramet.srt.model_executor.model_runner import ModelRunner
from ramet.srt.sampling.sampling_params import SamplingParams

VOCAB_SIZE = 50_000


@dataclass(frozen=True)
class PassTimes:
    """What a pass takes: the weights' bytes, in whose shadow the first tokens are free, other tokens, and keys read.

    As measured on an H200 with an 8 B model.
    """

    base_s: float = 0.005
    num_free_tokens: int = 200
    token_s: float = 21e-6
    key_s: float = 0.04e-6
    host_s: float = 0.0015  # to plan and to launch from a graph
    ungraphed_host_s: float = 0.026  # kernel by kernel, of which the device computes the first meanwhile
    pass_sizes: tuple[int, ...] = CHUNK_SIZES  # to which passes with prompt chunks are padded, and run from graphs
    jitter: float = 0.0  # standard deviation of what a pass takes, as a part of it

    def seconds(self, num_tokens: int, num_keys: int) -> float:
        return self.base_s + self.token_s * max(0, num_tokens - self.num_free_tokens) + self.key_s * num_keys

    def padded(self, num_tokens: int) -> int:
        place = bisect_left(self.pass_sizes, num_tokens)
        return self.pass_sizes[place] if place < len(self.pass_sizes) else num_tokens


@dataclass(frozen=True)
class Arrival:
    """A request of a trace."""

    at_s: float
    num_in: int
    num_out: int
    prefix: int = -1  # the same number: prompts that share their first half


def poisson(per_s: float, num_in: int, num_out: int, until_s: float, seed: int) -> list[Arrival]:
    """Requests of one kind, as they come from many users who don't know of each other."""
    rng, at_s, arrivals = random.Random(seed), 0.0, []
    while (at_s := at_s + rng.expovariate(per_s)) < until_s:
        arrivals.append(Arrival(at_s, num_in, num_out))
    return arrivals


@dataclass
class Timeline:
    """When a request's tokens came."""

    arrival: Arrival
    token_times: list[float] = field(default_factory=list)

    @property
    def ttft_s(self) -> float:
        return self.token_times[0] - self.arrival.at_s

    @property
    def e2e_s(self) -> float:
        return self.token_times[-1] - self.arrival.at_s

    @property
    def gaps_s(self) -> list[float]:
        return [after - before for before, after in zip(self.token_times, self.token_times[1:], strict=False)]


ROUND_TIMES = PassTimes(token_s=20e-6, host_s=0.0003, pass_sizes=())  # for what doesn't hang on such figures


class Clock:
    """The simulation's time in seconds."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class SimulatedWorker:
    """Computes passes one after the other, which takes time and nothing else."""

    def __init__(self, clock: Clock, times: PassTimes):
        self._clock = clock
        self._times = times
        self._rng = random.Random(3)
        self.free_s = 0.0  # when the last pass has ended
        self.busy_s = self.idle_s = 0.0  # idle while there was something to compute
        self.num_passes = 0

    def launch_for_result(self, plan: BatchPlan) -> Callable[[], BatchResult]:
        times, sizes = self._times, [len(sequence.input_ids) for sequence in plan.sequences]
        num_keys = sum(sequence.start for sequence in plan.sequences) + sum(sizes)
        num_tokens = sum(sizes) if max(sizes) == 1 else times.padded(sum(sizes))
        is_in_graph = num_tokens <= max(times.pass_sizes, default=num_tokens)
        self._clock.now_s += times.host_s
        begin_s = max(self.free_s, self._clock.now_s)
        seconds = times.seconds(num_tokens, num_keys) * max(0.5, self._rng.gauss(1.0, times.jitter))
        if not is_in_graph:
            self._clock.now_s += times.ungraphed_host_s - times.host_s
        end_s = max(begin_s + seconds, 0.0 if is_in_graph else self._clock.now_s)
        self.idle_s += begin_s - self.free_s
        self.busy_s += end_s - begin_s
        self.free_s = end_s
        tokens = [7] * sum(sequence.is_sampled for sequence in plan.sequences)
        self.num_passes += 1

        def wait() -> BatchResult:
            self._clock.now_s = max(self._clock.now_s, end_s)
            return BatchResult(token_ids=tokens, output_logprobs={}, prompt_logprobs={})

        return wait


class TraceChannel:
    """Hands the requests of a trace over when they come, and notes when their tokens do."""

    def __init__(self, clock: Clock, worker: SimulatedWorker, make_message: Callable[[Arrival, str], Message]):
        self._clock = clock
        self._worker = worker
        self._make_message = make_message
        self.coming: deque[Arrival] = deque()
        self.longest_wait_s = 0.0  # that was asked for while there was something to do
        self.timelines: dict[str, Timeline] = {}

    def send(self, output: BatchTokenIDOutput) -> None:
        for one in output.outputs:
            self.timelines[one.rid].token_times += [self._clock.now_s] * len(one.token_ids)

    def receive(self, timeout_s: float) -> list[Message]:
        """As the sockets do it, which wait for whole milliseconds; but while nothing is to do, until the next comes."""
        until_s = self._clock.now_s + int(1000 * timeout_s) / 1000
        next_s = self.coming[0].at_s if self.coming else until_s
        if timeout_s >= IDLE_POLL_S:
            until_s = next_s
            self._worker.free_s = max(self._worker.free_s, next_s)
        else:
            self.longest_wait_s = max(self.longest_wait_s, timeout_s)
        self._clock.now_s = max(self._clock.now_s, min(until_s, next_s))
        messages = []
        while self.coming and self.coming[0].at_s <= self._clock.now_s:
            rid = str(len(self.timelines))
            self.timelines[rid] = Timeline(self.coming.popleft())
            messages.append(self._make_message(self.timelines[rid].arrival, rid))
        return messages

    def reply(self, message: Message) -> None:
        raise AssertionError("nobody asks")


class Simulation:
    """A scheduler of one rank, its passes and its users.

    Args:
        plans_late: whether a pass is planned late in the one under way, and not as soon as that has begun.
        config: fields of SchedulerConfig that differ from a GPU's defaults.
    """

    def __init__(
        self, times: PassTimes | None = None, num_tokens: int = 400_000, plans_late: bool = True, **config: Any
    ):
        self.clock = Clock()
        times = times or PassTimes()
        self.worker = SimulatedWorker(self.clock, times)
        self.channel = TraceChannel(self.clock, self.worker, self._message)
        defaults: dict[str, Any] = {
            "max_running_requests": 256,
            "max_queued_requests": 4096,
            "page_size": 16,
            "chunked_prefill_size": 8192,
            "target_itl_s": 0.04,
            "most_itl_s": 0.1,
            "schedule_policy": "deadline",
            "low_priority_values_first": False,
            "disable_radix_cache": False,
            "stream_interval": 1,
            "random_seed": 0,
            "overlap": True,
        }
        runner = SimpleNamespace(
            lora=None,
            pass_sizes=times.pass_sizes,
            parallel=ParallelConfig(),
            max_total_num_tokens=num_tokens,
            windows=None,
            num_state_slots=0,
            max_req_len=num_tokens,
            device=torch.device("cpu"),
            finish_sending=None,
            use_quiet_moment=_nothing,
            weight_version="default",
            versions=None,
            req_pool=SimpleNamespace(last_tokens=None),
        )
        self.scheduler = Scheduler(
            SchedulerConfig(**defaults | config),
            cast(
                ModelConfig,
                SimpleNamespace(eos_token_ids=(), embedding=None, rope=RopeConfig(theta=1e4), has_fp8_cache=False),
            ),
            cast(ModelRunner, runner),
            cast(Any, _nothing),
            None,
            cast(SchedulerChannel, self.channel),
            clock=self.clock,
        )
        overlap = self.scheduler.config.overlap
        passes = make_passes(cast(TpModelWorker, self.worker), None, 1, overlap, self.clock)
        if not plans_late:
            passes.spare_s = lambda: 0.0  # type: ignore[method-assign]
        self.scheduler.passes = passes
        self._loop = SchedulerLoop(self.scheduler, cast(SchedulerChannel, self.channel))
        self._rng = random.Random(1)
        self._prefixes: dict[int, list[int]] = {}

    def run(self, arrivals: Iterable[Arrival]) -> list[Timeline]:
        """Serve a trace to its end; what became of each request, in the order of their arrival."""
        self.channel.coming.extend(sorted(arrivals, key=lambda arrival: arrival.at_s))
        while self.channel.coming or self.scheduler.has_work:
            self._loop.run_once()
        self.scheduler.check_caches()
        return list(self.channel.timelines.values())

    @property
    def idle_share(self) -> float:
        """Of the time in which there was something to compute: the part in which the device had nothing."""
        return self.worker.idle_s / (self.worker.idle_s + self.worker.busy_s)

    def _message(self, arrival: Arrival, rid: str) -> TokenizedGenerateReqInput:
        params = SamplingParams(max_new_tokens=arrival.num_out, temperature=0.0, ignore_eos=True)
        return TokenizedGenerateReqInput(rid=rid, input_ids=self._prompt(arrival), sampling_params=params, stream=True)

    def _prompt(self, arrival: Arrival) -> list[int]:
        if arrival.prefix < 0:
            return self._rng.choices(range(VOCAB_SIZE), k=arrival.num_in)
        half = arrival.num_in // 2
        prefix = self._prefixes.setdefault(arrival.prefix, self._rng.choices(range(VOCAB_SIZE), k=half))
        return prefix + self._rng.choices(range(VOCAB_SIZE), k=arrival.num_in - half)


def _nothing() -> None:
    """No request has stop strings, and nothing is prepared in quiet moments."""


class Alternating:
    """The rule that went before: by turns, a pass computes prompts in the order of their arrival, or decodes.

    One pass is planned ahead, as it is by the scheduler. There is room for everyone.
    """

    def __init__(self, times: PassTimes, budget: int):
        self._times = times
        self._budget = budget
        self._waiting: deque[tuple[Timeline, int]] = deque()  # with the prompt tokens that are still to be computed
        self._running: list[Timeline] = []

    def run(self, arrivals: Iterable[Arrival]) -> list[Timeline]:
        """As Simulation.run."""
        coming = deque(sorted(arrivals, key=lambda arrival: arrival.at_s))
        timelines: list[Timeline] = []
        now_s, ends_s, is_prompts = 0.0, [0.0, 0.0], False
        while coming or self._waiting or self._running:
            now_s = max(ends_s[-2], now_s if self._waiting or self._running else coming[0].at_s) + self._times.host_s
            while coming and coming[0].at_s <= now_s:
                timelines.append(Timeline(coming.popleft()))
                self._waiting.append((timelines[-1], timelines[-1].arrival.num_in))
            is_prompts = bool(self._waiting) and not (is_prompts and self._running)
            seconds, gaining = self._prompts() if is_prompts else self._decode()
            ends_s.append(max(ends_s[-1], now_s) + seconds)
            for timeline in gaining:
                timeline.token_times.append(ends_s[-1])
            self._running = [one for one in self._running if len(one.token_times) < one.arrival.num_out]
        return timelines

    def _prompts(self) -> tuple[float, list[Timeline]]:
        """What the pass takes, and who gets a token from it."""
        left, num_keys, done = self._budget, 0, []
        while self._waiting and left:
            timeline, missing = self._waiting.popleft()
            taken = min(missing, left)
            left -= taken
            num_keys += timeline.arrival.num_in - missing + taken
            if taken < missing:
                self._waiting.appendleft((timeline, missing - taken))
            else:
                done.append(timeline)
        self._running += done
        return self._times.seconds(self._times.padded(self._budget - left), num_keys), done

    def _decode(self) -> tuple[float, list[Timeline]]:
        num_keys = sum(one.arrival.num_in + len(one.token_times) for one in self._running)
        return self._times.seconds(len(self._running), num_keys), list(self._running)
