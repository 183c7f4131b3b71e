"""Owns the start and the end of one rank: whom it meets and what it builds. What it does between, its role says."""

import functools
import importlib
import logging
import os
import signal
import time
from collections.abc import Callable

import torch

from ramet.srt.configs.device_config import pick_device
from ramet.srt.configs.load_config import LoadContext
from ramet.srt.configs.model_config import ModelConfig
from ramet.srt.configs.scheduler_config import SchedulerConfig
from ramet.srt.distributed.node_memory import NodeMemory
from ramet.srt.distributed.parallel_state import init_process_groups
from ramet.srt.distributed.rendezvous import Rendezvous
from ramet.srt.distributed.words import NodeVoice
from ramet.srt.managers.child_process import ChildConfig
from ramet.srt.managers.follower import FollowerSockets
from ramet.srt.managers.io_struct import SchedulerReady
from ramet.srt.managers.leader import LeaderSockets
from ramet.srt.managers.pulse import WatchLimits
from ramet.srt.managers.role import Role, RoleSockets
from ramet.srt.managers.watchdog import end_stopped_launcher
from ramet.srt.model_executor.model_runner import ModelRunner
from ramet.srt.utils.hub import resolve_model_path, resolve_tokenizer_path, snapshot_revision
from ramet.srt.utils.net import choose_interface, format_url, local_address, reachable_host
from ramet.srt.weights.report import StandsStill

logger = logging.getLogger(__name__)

INSTANCE_URL_KEY = "instance-url"
LOST_NODE_EXIT_CODE = 71


class RankStart:
    """A rank on its way to serving."""

    def __init__(self, config: ChildConfig, voice: NodeVoice, launcher_moves: Callable[[], bool]):
        """
        Args:
            voice: what the nodes of the instance say to each other about processes that stand still.
            launcher_moves: whether the main process does.
        """
        self.config = config
        self._voice = voice
        self._launcher_moves = launcher_moves
        self.args = config.make_server_args()
        self.parallel = config.parallel
        self.phases: dict[str, float] = {}
        self._sockets: RoleSockets | None = None  # of a rank that has met the others before it knew its model
        self.rendezvous: Rendezvous | None = None  # with the other ranks: from the meeting on, and if there are others
        self._on_phase("imports")

    def _on_phase(self, name: str) -> None:
        """Note that start-up phase `name` has just ended: seconds since the launch of the instance."""
        self.phases[name] = round(time.time() - self.config.launch_time, 3)

    def warm_up(self) -> None:
        """For a spare: take the device and meet the other ranks, before anybody knows the model.

        Raises what `run` does.
        """
        self._take_device()
        if self.device.type == "cuda":
            torch.zeros(1, device=self.device)  # the context, and the libraries that come with the first kernel
            torch.cuda.synchronize(self.device)
        else:
            ones = torch.ones(8, 8)
            torch.mm(ones, ones)  # threads and libraries that come with the first product
        self._sockets = self._meet()
        importlib.import_module("ramet.srt.utils.http_client")  # what is imported only where it is needed
        if self.args.modelexpress is not None:
            importlib.import_module("ramet.srt.modelexpress.client.publication")
            importlib.import_module("ramet.srt.modelexpress.client.seed_search")

    def take(self, config: ChildConfig) -> None:
        """For a spare that is warm: what it is to be. Sizes and addresses are those that it was warmed up with."""
        self.config = config
        self.args = config.make_server_args()
        self.phases = {}
        self._on_phase("orders")

    def _take_device(self) -> None:
        self.device = pick_device(self.args.device, self.args.gpu_id(self.parallel.world_rank))
        self._on_phase("device")

    def run(self) -> "Rank":
        """Meet the other ranks, load the weights, let others find them, and get ready to serve.

        Raises:
            ValueError, OSError, MemoryError, RuntimeError: if the rank can't serve; the message says why.
        """
        args = self.args
        if self._sockets is None:
            self._take_device()
        needs_files = not (args.takes_weights_from_instances or args.awaits_weights)
        model_path = resolve_model_path(args.model_path, args.revision, weights=needs_files)
        config = ModelConfig.from_path(
            model_path,
            model_name=args.model_name,
            revision=snapshot_revision(model_path) or args.revision,
            dtype=args.dtype,
            context_length=args.context_length,
            quantization=args.quantization,
            tokenizer_path=None
            if args.tokenizer_path is None
            else resolve_tokenizer_path(args.tokenizer_path, "", None),
            is_embedding=args.is_embedding,
            kv_cache_dtype=args.kv_cache_dtype,
        )
        scheduler_config = args.scheduler_config(self.device.type)
        sockets = self._sockets or self._meet()
        runner_config = args.runner_config(self.device.type, dtype=config.dtype, quantization=config.quantization)
        self.runner = ModelRunner(
            runner_config, config, self.parallel, self.device, self._on_phase, self._load_context()
        )
        role = sockets.begin(self.runner)
        if self.config.bootstrap_url is not None:
            self.runner.publish(self.config.bootstrap_url, functools.partial(self._load_of, role))
            self._on_phase("registered")
        addresses = role.get_ready(self._on_phase)
        self._on_phase("ready")
        ready = SchedulerReady(
            world_rank=self.parallel.world_rank,
            max_total_num_tokens=self.runner.max_total_num_tokens,
            max_running_requests=scheduler_config.max_running_requests,
            max_req_len=self.runner.max_req_len,
            scheduler_addresses=addresses,
            load_report=self.runner.load_report,
            phases=self.phases,
        )
        return Rank(self.config.parent_pid, self.runner, role, self.rendezvous, ready)

    def _load_of(self, role: Role) -> float:
        """How busy the rank is, from 0 to 1.

        Raises:
            StandsStill: if nobody would answer a request.
        """
        if not self._launcher_moves():
            raise StandsStill
        return role.load()

    def _meet(self) -> RoleSockets:
        """Open this rank's sockets, and find the other ranks if there are any."""
        args, parallel = self.args, self.parallel
        scheduler_config = args.scheduler_config(self.device.type)
        is_local = args.nnodes == 1
        address = self.config.directory if is_local else local_address(args.dist_init_addr)
        if parallel.world_size == 1:
            return self._open_leader(scheduler_config, None, address)
        if is_local:
            choose_interface("127.0.0.1", ["GLOO"])
            # A process has one interface for all that NCCL does: also for sending to ranks of instances elsewhere.
            choose_interface(reachable_host(args.host), ["NCCL"])
        else:
            choose_interface(address)
        meeting_point = f"file:{address}/rendezvous" if is_local else str(args.dist_init_addr)
        rendezvous = Rendezvous(meeting_point, parallel.world_rank, parallel.world_size, args.nnodes, args.dist_timeout)
        self.rendezvous = rendezvous
        sockets: RoleSockets
        if parallel.world_rank == parallel.leader_rank:
            sockets = self._open_leader(scheduler_config, rendezvous, address)
        else:
            sockets = FollowerSockets(parallel, rendezvous, address, scheduler_config.max_running_requests)
        rendezvous.join()
        if args.nnodes > 1 and parallel.world_rank == args.local_ranks.start:
            title = f"the scheduler (rank {parallel.world_rank}), process {os.getpid()},"
            limit_s = WatchLimits(args.watchdog_timeout).still_s
            rendezvous.start_pulse(title, limit_s, self._voice, self._on_lost_node, _on_instance_end)
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        memory = NodeMemory(self.config.exchange_fd, args.local_ranks) if self.device.type == "cpu" else None
        init_process_groups(parallel, rendezvous.store, backend, args.dist_timeout, memory)
        self._on_phase("joined")
        return sockets

    def _on_lost_node(self, line: str) -> None:
        logger.critical("%s; the instance can't go on", line)
        logging.shutdown()
        end_stopped_launcher(self.config)
        os._exit(LOST_NODE_EXIT_CODE)

    def _open_leader(
        self, scheduler_config: SchedulerConfig, rendezvous: Rendezvous | None, address: str
    ) -> LeaderSockets:
        return LeaderSockets(
            scheduler_config,
            self.parallel,
            rendezvous,
            address,
            self.config.port_args,
            lambda: resolve_tokenizer_path(self.args.tokenizer_path, self.args.model_path, self.args.revision),
            self.args.grammar_backend,
        )

    def _load_context(self) -> LoadContext:
        """What is said to other instances about this one. Only node 0 knows the port that users come to."""
        host, port = reachable_host(self.args.host), self.args.port
        if self.args.nnodes > 1 and self.args.host in ("0.0.0.0", "::"):
            host = self.args.head_host
        url = format_url(host, port, self.args.scheme) if self.args.has_http else ""
        if self.rendezvous is not None:
            if self.parallel.world_rank == 0:
                self.rendezvous.put(INSTANCE_URL_KEY, url)
            url = self.rendezvous.wait_for(INSTANCE_URL_KEY)
        return LoadContext(instance_url=url, started_at=self.config.launch_time, board=self.rendezvous)

    def let_loss_be_named(self, error: Exception) -> bool:
        """Whether `error`, at the start or later, says that another rank has gone; which one is to be said first."""
        return self.rendezvous is not None and self.rendezvous.let_loss_be_named(error)


class Rank:
    """One rank that can serve. The leader of a replica schedules; its other ranks run what it plans.

    Args:
        rendezvous: None in an instance of one rank.
        ready: what the launcher is told.
    """

    def __init__(
        self,
        parent_pid: int,
        runner: ModelRunner,
        role: Role,
        rendezvous: Rendezvous | None,
        ready: SchedulerReady,
    ):
        self._parent_pid = parent_pid
        self._runner = runner
        self._role = role
        self._rendezvous = rendezvous
        self.ready = ready
        self.stopping = False

    def task_since(self) -> float | None:
        """time.monotonic() of the beginning of what this rank is at, if that is to end soon. Any thread may ask."""
        return self._role.task_since()

    def run(self) -> None:
        """Serve until `stop`, or until the launcher has gone."""
        while not self.stopping and os.getppid() == self._parent_pid:
            self._role.run_once()
        self._role.finish()

    def stop(self) -> None:
        """End the loop after the pass that runs."""
        self.stopping = True

    def close(self) -> None:
        """Withdraw the weights and leave the other ranks."""
        self._runner.close()
        if self._rendezvous is not None:
            if self.ready.world_rank == 0:
                self._rendezvous.end()
            self._rendezvous.close()
        self._role.close()


def _on_instance_end() -> None:
    """Node 0 has ended the instance in good order: so does this node."""
    os.kill(os.getpid(), signal.SIGTERM)
