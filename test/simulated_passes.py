"""Runs the real scheduler against ranks that only take time, on a clock of the simulation: nothing sleeps.

What a pass takes is said by a formula (`PassTimes`), so a trace of requests shows what the scheduler's decisions do to
first tokens and token times. `Alternating` is the rule that went before, to compare with.
"""

import random
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NoReturn, cast

import torch
from ramet.srt.batch.batch_plan import BatchPlan, BatchResult
from ramet.srt.configs.model_config import ModelConfig
from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.configs.scheduler_config import SchedulerConfig
from ramet.srt.managers.io_struct import BatchTokenIDOutput, Message, TokenizedGenerateReqInput
from ramet.srt.managers.passes import make_passes
from ramet.srt.managers.scheduler import Scheduler
from ramet.srt.managers.scheduler_channel import SchedulerChannel
from ramet.srt.managers.tp_worker import TpModelWorker
from ramet.srt.model_executor.model_runner import ModelRunner
from ramet.srt.sampling.sampling_params import SamplingParams

VOCAB_SIZE = 50_000
HOST_S = 0.0003  # that planning a pass takes


@dataclass(frozen=True)
class PassTimes:
    """What a pass takes: the weights' bytes, in whose shadow the first tokens are free, other tokens, and keys read."""

    base_s: float = 0.005
    num_free_tokens: int = 200
    token_s: float = 20e-6
    key_s: float = 0.04e-6

    def seconds(self, num_tokens: int, num_keys: int) -> float:
        return self.base_s + self.token_s * max(0, num_tokens - self.num_free_tokens) + self.key_s * num_keys


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
        self._free_s = 0.0
        self.num_passes = 0

    def launch_for_result(self, plan: BatchPlan) -> Callable[[], BatchResult]:
        num_tokens = sum(len(sequence.input_ids) for sequence in plan.sequences)
        num_keys = sum(sequence.start + len(sequence.input_ids) for sequence in plan.sequences)
        end_s = self._free_s = max(self._free_s, self._clock.now_s) + self._times.seconds(num_tokens, num_keys)
        tokens = [7] * sum(sequence.is_sampled for sequence in plan.sequences)
        self.num_passes += 1

        def wait() -> BatchResult:
            self._clock.now_s = max(self._clock.now_s, end_s)
            return BatchResult(token_ids=tokens, output_logprobs={}, prompt_logprobs={})

        return wait


class TraceChannel:
    """Notes when tokens come."""

    def __init__(self, clock: Clock):
        self._clock = clock
        self.timelines: dict[str, Timeline] = {}

    def send(self, output: BatchTokenIDOutput) -> None:
        for one in output.outputs:
            self.timelines[one.rid].token_times += [self._clock.now_s] * len(one.token_ids)

    def receive(self, timeout_s: float) -> list[Message]:
        return []

    def reply(self, message: Message) -> None:
        raise AssertionError("nobody asks")


class Simulation:
    """A scheduler of one rank, its passes and its users.

    Args:
        config: fields of SchedulerConfig that differ from a GPU's defaults.
    """

    def __init__(self, times: PassTimes | None = None, num_tokens: int = 400_000, **config: Any):
        self.clock = Clock()
        self.channel = TraceChannel(self.clock)
        self.worker = SimulatedWorker(self.clock, times or PassTimes())
        defaults: dict[str, Any] = {
            "max_running_requests": 256,
            "max_queued_requests": 4096,
            "page_size": 16,
            "chunked_prefill_size": 8192,
            "target_itl_s": 0.04,
            "schedule_policy": "deadline",
            "disable_radix_cache": False,
            "stream_interval": 1,
            "random_seed": 0,
            "overlap": True,
        }
        runner = SimpleNamespace(
            pass_sizes=[],
            parallel=ParallelConfig(),
            max_total_num_tokens=num_tokens,
            max_req_len=num_tokens,
            device=torch.device("cpu"),
            finish_sending=None,
            req_pool=SimpleNamespace(last_tokens=None),
        )
        self.scheduler = Scheduler(
            SchedulerConfig(**defaults | config),
            cast(ModelConfig, SimpleNamespace(eos_token_ids=())),
            cast(ModelRunner, runner),
            _no_tokenizer,
            None,
            cast(SchedulerChannel, self.channel),
            clock=self.clock,
        )
        overlap = self.scheduler.config.overlap
        self.scheduler.passes = make_passes(cast(TpModelWorker, self.worker), None, 1, overlap, self.clock)
        self._rng = random.Random(1)
        self._prefixes: dict[int, list[int]] = {}

    def run(self, arrivals: Iterable[Arrival]) -> list[Timeline]:
        """Serve a trace to its end; what became of each request, in the order of their arrival."""
        coming = deque(sorted(arrivals, key=lambda arrival: arrival.at_s))
        while coming or self.scheduler.has_work:
            if not self.scheduler.has_work:
                self.clock.now_s = max(self.clock.now_s, coming[0].at_s)
            while coming and coming[0].at_s <= self.clock.now_s:
                self.submit(coming.popleft())
            self.clock.now_s += HOST_S
            self.scheduler.step()
        self.scheduler.check_caches()
        return list(self.channel.timelines.values())

    def submit(self, arrival: Arrival) -> None:
        """A request comes in."""
        rid = str(len(self.channel.timelines))
        self.channel.timelines[rid] = Timeline(arrival)
        params = SamplingParams(max_new_tokens=arrival.num_out, temperature=0.0, ignore_eos=True)
        message = TokenizedGenerateReqInput(
            rid=rid, input_ids=self._prompt(arrival), sampling_params=params, stream=True
        )
        self.scheduler.handle(message)

    def _prompt(self, arrival: Arrival) -> list[int]:
        if arrival.prefix < 0:
            return self._rng.choices(range(VOCAB_SIZE), k=arrival.num_in)
        half = arrival.num_in // 2
        prefix = self._prefixes.setdefault(arrival.prefix, self._rng.choices(range(VOCAB_SIZE), k=half))
        return prefix + self._rng.choices(range(VOCAB_SIZE), k=arrival.num_in - half)


def _no_tokenizer() -> NoReturn:
    raise AssertionError("no request has stop strings")


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
            now_s = max(ends_s[-2], now_s if self._waiting or self._running else coming[0].at_s) + HOST_S
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
        return self._times.seconds(self._budget - left, num_keys), done

    def _decode(self) -> tuple[float, list[Timeline]]:
        num_keys = sum(one.arrival.num_in + len(one.token_times) for one in self._running)
        return self._times.seconds(len(self._running), num_keys), list(self._running)
