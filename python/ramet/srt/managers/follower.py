"""Owns a rank that follows its replica's leader: it runs what the leader plans, and sends results if it samples."""

import time
from collections.abc import Callable

from ramet.srt.batch.batch_plan import BatchPlan
from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.distributed.rendezvous import Rendezvous
from ramet.srt.managers.lora_desk import LoraMessage, follow
from ramet.srt.managers.plan_channel import PlanReceiver, ResultSender
from ramet.srt.managers.pulse import Task
from ramet.srt.managers.role import READY_KEY
from ramet.srt.managers.tp_worker import TpModelWorker
from ramet.srt.model_executor.model_runner import ModelRunner
from ramet.srt.weights.inspection_messages import WeightInspection
from ramet.srt.weights.memory_messages import MemoryStep
from ramet.srt.weights.update_messages import WeightStep

FOLLOWER_POLL_S = 1.0
BUSY_WINDOW_S = 2.0  # a rank that has had no plan for so long is idle


class Follower:
    """Decides nothing: a Role.

    Args:
        run_pass: computes this rank's part of a pass.
        on_ready: tells the leader that this rank can.
    """

    def __init__(
        self,
        worker: TpModelWorker,
        run_pass: Callable[[BatchPlan], None],
        plans: PlanReceiver,
        max_running_requests: int,
        on_ready: Callable[[], None],
    ):
        self._worker = worker
        self._run_pass = run_pass
        self._plans = plans
        self._max_running_requests = max_running_requests
        self._on_ready = on_ready
        self._last_plan_time, self._last_plan_len = 0.0, 0
        self._turn = Task()

    def task_since(self) -> float | None:
        return None if self._worker.profiler.is_writing else self._turn.since

    def load(self) -> float:
        """By the last plan: requests in it over those that can run."""
        since_s = time.monotonic() - self._last_plan_time
        return min(1.0, self._last_plan_len / self._max_running_requests) if since_s < BUSY_WINDOW_S else 0.0

    def get_ready(self, _on_phase: Callable[[str], None]) -> list[str]:
        """Tell the leader that this rank can take passes."""
        self._on_ready()
        return []

    def run_once(self) -> None:
        """Do what the leader says next, if it comes soon."""
        self._turn.begin()
        message = self._plans.receive(FOLLOWER_POLL_S)
        if isinstance(message, BatchPlan):
            self._last_plan_time, self._last_plan_len = time.monotonic(), len(message.sequences)
            self._run_pass(message)
        elif isinstance(message, LoraMessage):
            assert self._worker.model_runner.lora is not None
            follow(self._worker.model_runner.lora, message)
        elif isinstance(message, WeightStep | MemoryStep):
            self._worker.model_runner.versions.follow(message)
        elif isinstance(message, WeightInspection):
            self._worker.model_runner.inspector.inspect(message)
        elif message is not None:
            self._worker.profiler.follow(message)
        else:
            self._worker.model_runner.use_quiet_moment()

    def finish(self) -> None:
        self._turn.end()
        self._worker.profiler.close()

    def close(self) -> None:
        self._plans.close()


class FollowerSockets:
    """A follower's RoleSockets.

    Args:
        address: a folder for Unix sockets, or the IP address of this node.
        max_running_requests: of the replica.
    """

    def __init__(self, parallel: ParallelConfig, rendezvous: Rendezvous, address: str, max_running_requests: int):
        self._parallel = parallel
        self._rendezvous = rendezvous
        self._max_running_requests = max_running_requests
        self._plans = PlanReceiver(rendezvous, address)

    def begin(self, runner: ModelRunner) -> Follower:
        """Run the rank's model, and connect to the leader if this rank's results are the replica's."""
        parallel, worker = self._parallel, TpModelWorker(runner)

        def tell_ready() -> None:
            self._rendezvous.put(f"{READY_KEY}/{parallel.world_rank}", runner.weight_version)

        run_pass: Callable[[BatchPlan], None] = worker.launch
        if parallel.world_rank == parallel.sampling_rank:
            run_pass = _reporting(worker, self._plans.open_results(parallel))
        return Follower(worker, run_pass, self._plans, self._max_running_requests, tell_ready)


def _reporting(worker: TpModelWorker, results: ResultSender) -> Callable[[BatchPlan], None]:
    return lambda plan: results.send(worker.launch_for_result(plan)())
