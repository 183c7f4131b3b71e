"""Owns the rank that leads its replica: its sockets, its scheduler, and whom it waits for before it serves."""

import functools
import os
from collections.abc import Callable

from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.configs.scheduler_config import SchedulerConfig
from ramet.srt.distributed.rendezvous import Rendezvous
from ramet.srt.managers.grammar_pool import make_grammar_pool
from ramet.srt.managers.plan_channel import PlanSender
from ramet.srt.managers.port_args import PortArgs
from ramet.srt.managers.pulse import Task
from ramet.srt.managers.role import READY_KEY
from ramet.srt.managers.scheduler import Scheduler
from ramet.srt.managers.scheduler_channel import SchedulerChannel
from ramet.srt.managers.scheduler_loop import SchedulerLoop
from ramet.srt.model_executor.model_runner import ModelRunner
from ramet.srt.text.tokenizer import Tokenizer
from ramet.srt.utils.net import format_address
from ramet.srt.weights.version import check_same_version

SCHEDULER_KEY = "scheduler"
TOKENIZER_KEY, DETOKENIZER_KEY = "tokenizer", "detokenizer"


class OtherRanks:
    """The other ranks of an instance, as a leader meets them.

    Args:
        address: a folder for Unix sockets, or the IP address of this node.
        scheduler_address: where the leader's scheduler reads.
        port_args: where the processes of node 0 listen. World rank 0 knows, and tells the other leaders.
    """

    def __init__(
        self,
        rendezvous: Rendezvous,
        parallel: ParallelConfig,
        address: str,
        scheduler_address: str,
        port_args: PortArgs,
    ):
        self._rendezvous = rendezvous
        self._parallel = parallel
        if parallel.world_rank == 0:
            rendezvous.put(TOKENIZER_KEY, port_args.tokenizer_ipc_name)
            rendezvous.put(DETOKENIZER_KEY, port_args.detokenizer_ipc_name)
        rendezvous.put(f"{SCHEDULER_KEY}/{parallel.world_rank}", scheduler_address)
        self.plans = PlanSender(rendezvous, address)

    def connect(self) -> PortArgs:
        """Connect to the followers; where the processes of node 0 listen. All have joined."""
        self.plans.connect(self._parallel)
        get = self._rendezvous.get
        return PortArgs(tokenizer_ipc_name=get(TOKENIZER_KEY), detokenizer_ipc_name=get(DETOKENIZER_KEY))

    def wait_for_followers(self, weight_version: str) -> None:
        """Wait until the replica's other ranks can take passes.

        Raises:
            ValueError: if one has other weights than this rank, whose version is given.
        """
        parallel = self._parallel
        others = [rank for rank in parallel.replica_ranks if rank != parallel.world_rank]
        versions = self._rendezvous.wait_all(READY_KEY, others)
        check_same_version({parallel.world_rank: weight_version} | dict(zip(others, versions, strict=True)))

    def meet_leaders(self, weight_version: str) -> list[str]:
        """Say that this replica can serve. On world rank 0, wait for the others; where the scheduler of each reads.

        Raises:
            ValueError: if one has other weights than this rank, whose version is given.
        """
        parallel, rendezvous = self._parallel, self._rendezvous
        rendezvous.put(f"{READY_KEY}/{parallel.world_rank}", weight_version)
        if parallel.world_rank != 0:
            return []
        leaders = range(0, parallel.world_size, len(parallel.replica_ranks))
        check_same_version(dict(zip(leaders, rendezvous.wait_all(READY_KEY, leaders), strict=True)))
        return [rendezvous.get(f"{SCHEDULER_KEY}/{leader}") for leader in leaders]


class Leader:
    """Schedules for its replica: a Role.

    Args:
        others: None in an instance of one rank.
    """

    def __init__(self, loop: SchedulerLoop, channel: SchedulerChannel, others: OtherRanks | None):
        self._loop = loop
        self._scheduler = loop.scheduler
        self._channel = channel
        self._others = others
        self._turn = Task()

    def task_since(self) -> float | None:
        if self._scheduler.worker.profiler.is_writing:
            return None
        begun = [when for when in (self._turn.since, self._scheduler.passes.waiting_since) if when is not None]
        return min(begun, default=None)

    def load(self) -> float:
        return self._scheduler.load()

    def get_ready(self, on_phase: Callable[[str], None]) -> list[str]:
        """Wait for the followers, warm the replica up and, on world rank 0, wait for the other leaders."""
        if self._others is not None:
            self._others.wait_for_followers(self._scheduler.weight_version)
        self._scheduler.warm_up()
        on_phase("warm_up")
        if self._others is None:
            return [self._channel.address]
        return self._others.meet_leaders(self._scheduler.weight_version)

    def run_once(self) -> None:
        self._turn.begin()
        self._loop.run_once()

    def finish(self) -> None:
        self._turn.end()
        self._scheduler.worker.profiler.close()

    def close(self) -> None:
        self._scheduler.close()
        self._channel.close()
        if self._others is not None:
            self._others.plans.close()


class LeaderSockets:
    """A leader's RoleSockets.

    Args:
        rendezvous: None in an instance of one rank.
        address: a folder for Unix sockets, or the IP address of this node.
        find_tokenizer: its folder or file, for the scheduler.
        grammar_backend: its name.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        parallel: ParallelConfig,
        rendezvous: Rendezvous | None,
        address: str,
        port_args: PortArgs,
        find_tokenizer: Callable[[], str],
        grammar_backend: str,
    ):
        self._config = config
        self._port_args = port_args
        self._find_tokenizer = find_tokenizer
        self._grammar_backend = grammar_backend
        is_folder = address.startswith(os.sep)
        channel = SchedulerChannel(
            f"ipc://{address}/scheduler-{parallel.dp_rank}" if is_folder else f"tcp://{format_address(address, '*')}"
        )
        self._channel = channel
        self._others = None
        if rendezvous is not None:
            self._others = OtherRanks(rendezvous, parallel, address, channel.address, port_args)

    def begin(self, runner: ModelRunner) -> Leader:
        """Connect to the followers and to node 0, and make the scheduler."""
        others = self._others
        self._channel.connect(self._port_args if others is None else others.connect())
        get_tokenizer = functools.cache(functools.partial(Tokenizer.from_path, self._find_tokenizer()))
        scheduler = Scheduler(
            self._config,
            runner.model_config,
            runner,
            get_tokenizer,
            make_grammar_pool(self._grammar_backend, self._find_tokenizer, runner.model_config),
            self._channel,
            None if others is None else others.plans,
        )
        return Leader(SchedulerLoop(scheduler, self._channel), self._channel, others)
