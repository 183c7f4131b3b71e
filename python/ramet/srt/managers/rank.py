"""Owns one rank from its start to its end: who it meets, what it builds, and whether it schedules or follows."""

import functools
import logging
import os
import signal
import time

from ramet.srt.batch.batch_plan import BatchPlan
from ramet.srt.configs.device_config import pick_device
from ramet.srt.configs.load_config import LoadContext
from ramet.srt.configs.model_config import ModelConfig
from ramet.srt.distributed.parallel_state import init_process_groups
from ramet.srt.distributed.rendezvous import Rendezvous
from ramet.srt.managers.child_process import ChildConfig
from ramet.srt.managers.io_struct import SchedulerReady
from ramet.srt.managers.plan_channel import PlanReceiver, PlanSender
from ramet.srt.managers.scheduler import Scheduler
from ramet.srt.managers.scheduler_channel import SchedulerChannel
from ramet.srt.managers.tp_worker import TpModelWorker
from ramet.srt.model_executor.model_runner import ModelRunner
from ramet.srt.sampling.grammar import make_grammar_backend
from ramet.srt.server_args import PortArgs
from ramet.srt.text.tokenizer import Tokenizer
from ramet.srt.utils.hub import resolve_model_path, resolve_tokenizer_path, snapshot_revision
from ramet.srt.utils.net import choose_interface, format_url, local_address, reachable_host

logger = logging.getLogger(__name__)

FOLLOWER_POLL_S = 1.0
BUSY_WINDOW_S = 2.0  # a rank that has had no plan for so long is idle
INSTANCE_URL_KEY = "instance-url"
LOST_NODE_EXIT_CODE = 71
READY_KEY, SCHEDULER_KEY = "ready", "scheduler"
TOKENIZER_KEY, DETOKENIZER_KEY = "tokenizer", "detokenizer"


class Rank:
    """One rank. The leader of a replica schedules; its other ranks run what it plans."""

    def __init__(self, config: ChildConfig):
        self.config = config
        self.args = config.make_server_args()
        self.parallel = config.parallel
        self.is_leader = self.parallel.world_rank == self.parallel.leader_rank
        self.stopping = False
        self.phases: dict[str, float] = {}
        self.rendezvous: Rendezvous | None = None
        self.runner: ModelRunner | None = None
        self.scheduler: Scheduler | None = None
        self._channel: SchedulerChannel | None = None
        self._plans: PlanSender | PlanReceiver | None = None
        self._last_plan_time, self._last_plan_len = 0.0, 0  # of a rank that follows
        self._on_phase("imports")

    def _on_phase(self, name: str) -> None:
        """Note that start-up phase `name` has just ended: seconds since the launch of the instance."""
        self.phases[name] = round(time.time() - self.config.launch_time, 3)

    @property
    def oldest_launch(self) -> float | None:
        """time.monotonic() of the launch of the oldest pass that has not come back."""
        return None if self.scheduler is None else self.scheduler.oldest_launch

    # -- Start

    def start(self) -> SchedulerReady:
        """Meet the other ranks, load the weights, let others find them, and get ready to serve.

        Raises:
            ValueError, OSError, MemoryError, RuntimeError: if the rank can't serve; the message says why.
        """
        self.device = pick_device(self.args.device, self.args.gpu_id(self.parallel.world_rank))
        self.args = args = self.args.with_device_defaults(self.device.type)
        self._on_phase("device")
        model_path = resolve_model_path(args.model_path, args.revision, weights=not args.takes_weights_from_instances)
        config = ModelConfig.from_path(
            model_path,
            model_name=args.model_name,
            revision=snapshot_revision(model_path) or args.revision,
            dtype=args.dtype,
            context_length=args.context_length,
            quantization=args.quantization,
        )
        self._meet()
        runner_config = args.runner_config(self.device.type, dtype=config.dtype, quantization=config.quantization)
        self.runner = ModelRunner(
            runner_config, config, self.parallel, self.device, self._on_phase, self._load_context()
        )
        if self.config.bootstrap_url is not None:
            self.runner.publish(self.config.bootstrap_url, self._load)
            self._on_phase("registered")
        if self.is_leader:
            self._make_scheduler(config)
        addresses = self._get_ready()
        self._on_phase("ready")
        return SchedulerReady(
            world_rank=self.parallel.world_rank,
            max_total_num_tokens=self.runner.max_total_num_tokens,
            max_running_requests=args.max_running_requests,
            max_req_len=self.runner.max_req_len,
            scheduler_addresses=addresses,
            load_report=self.runner.load_report,
            phases=self.phases,
        )

    def _meet(self) -> None:
        """Open this rank's sockets, find the other ranks and connect to those that it talks to."""
        args, parallel = self.args, self.parallel
        port_args = self.config.make_port_args()
        is_local = args.nnodes == 1
        address = self.config.directory if is_local else local_address(args.dist_init_addr)
        if self.is_leader:
            listen = f"ipc://{address}/scheduler-{parallel.dp_rank}" if is_local else _tcp_address(address)
            self._channel = SchedulerChannel(listen)
        if parallel.world_size > 1:
            choose_interface(address if not is_local else "127.0.0.1")
            meeting_point = f"file:{address}/rendezvous" if is_local else str(args.dist_init_addr)
            self.rendezvous = Rendezvous(
                meeting_point, parallel.world_rank, parallel.world_size, args.nnodes, args.dist_timeout
            )
            port_args = self._exchange_addresses(self.rendezvous, address, port_args)
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            init_process_groups(parallel, self.rendezvous.store, backend, args.dist_timeout)
            self._on_phase("joined")
        if self._channel is not None:
            self._channel.connect(port_args)

    def _exchange_addresses(self, rendezvous: Rendezvous, address: str, port_args: PortArgs) -> PortArgs:
        """Say where this rank listens, wait for all others, and return where node 0's processes listen."""
        rank = self.parallel.world_rank
        if rank == 0:
            rendezvous.put(TOKENIZER_KEY, port_args.tokenizer_ipc_name)
            rendezvous.put(DETOKENIZER_KEY, port_args.detokenizer_ipc_name)
        if self._channel is not None:
            rendezvous.put(f"{SCHEDULER_KEY}/{rank}", self._channel.address)
        self._plans = (PlanSender if self.is_leader else PlanReceiver)(rendezvous, address)
        rendezvous.join()
        self._plans.connect(self.parallel)
        if self.args.nnodes > 1 and rank == self.args.local_ranks.start:
            rendezvous.start_pulse(self._on_lost_node, self._on_instance_end)
        return PortArgs(
            tokenizer_ipc_name=rendezvous.get(TOKENIZER_KEY), detokenizer_ipc_name=rendezvous.get(DETOKENIZER_KEY)
        )

    def _load_context(self) -> LoadContext:
        """What is said to other instances about this one. Only node 0 knows the port that users come to."""
        host, port = reachable_host(self.args.host), self.args.port
        if self.args.nnodes > 1 and self.args.host in ("0.0.0.0", "::"):
            host = self.args.head_host
        url = format_url(host, port) if self.args.has_http else ""
        if self.rendezvous is not None:
            if self.parallel.world_rank == 0:
                self.rendezvous.put(INSTANCE_URL_KEY, url)
            url = self.rendezvous.wait_for(INSTANCE_URL_KEY)
        return LoadContext(instance_url=url, started_at=self.config.launch_time, board=self.rendezvous)

    def _load(self) -> float:
        """How busy this rank is, from 0 to 1: its replica's requests over those that can run."""
        if self.scheduler is not None:
            return self.scheduler.load()
        since_s = time.monotonic() - self._last_plan_time
        limit = self.args.max_running_requests or 1
        return min(1.0, self._last_plan_len / limit) if since_s < BUSY_WINDOW_S else 0.0

    def _make_scheduler(self, config: ModelConfig) -> None:
        assert self.runner is not None and self._channel is not None
        get_tokenizer = functools.cache(functools.partial(Tokenizer.from_path, resolve_tokenizer_path(self.args)))
        self.scheduler = Scheduler(
            self.args,
            config,
            self.runner,
            get_tokenizer,
            make_grammar_backend(self.args.grammar_backend, get_tokenizer, config),
            self._channel,
            self._plans if isinstance(self._plans, PlanSender) else None,
            overlap=self.device.type == "cuda" and not self.args.disable_overlap_schedule,
        )

    def _get_ready(self) -> list[str]:
        """Warm the replica up and wait for the others.

        Returns:
            For world rank 0, where the scheduler of each replica reads requests; for the others nothing.
        """
        rank, rendezvous = self.parallel.world_rank, self.rendezvous
        if rendezvous is not None and not self.is_leader:
            rendezvous.put(f"{READY_KEY}/{rank}", "")
            return []
        assert self.scheduler is not None and self._channel is not None
        if rendezvous is not None:
            rendezvous.wait_all(READY_KEY, [other for other in self.parallel.replica_ranks if other != rank])
        self.scheduler.warm_up()
        self._on_phase("warm_up")
        if rendezvous is None:
            return [self._channel.address]
        rendezvous.put(f"{READY_KEY}/{rank}", "")
        if rank != 0:
            return []
        leaders = range(0, self.parallel.world_size, len(self.parallel.replica_ranks))
        rendezvous.wait_all(READY_KEY, leaders)
        return [rendezvous.get(f"{SCHEDULER_KEY}/{leader}") for leader in leaders]

    # -- Life and end

    def run(self) -> None:
        """Serve until `stop`, or until the launcher has gone."""
        assert self.runner is not None
        worker = TpModelWorker(self.runner) if self.scheduler is None else self.scheduler.worker
        while self._goes_on():
            if self.scheduler is not None:
                self.scheduler.run_once()
            else:
                self._follow_once(worker)
        worker.profiler.close()

    def _follow_once(self, worker: TpModelWorker) -> None:
        """Do what the leader says next, if it comes soon."""
        assert isinstance(self._plans, PlanReceiver)
        message = self._plans.receive(FOLLOWER_POLL_S)
        if isinstance(message, BatchPlan):
            self._last_plan_time, self._last_plan_len = time.monotonic(), len(message.sequences)
            wait = worker.launch(message)
            if wait is not None:
                self._plans.send(wait())
        elif message is not None:
            worker.profiler.follow(message)

    def _goes_on(self) -> bool:
        return not self.stopping and os.getppid() == self.config.parent_pid

    def stop(self) -> None:
        """End the loop after the pass that runs."""
        self.stopping = True

    def _on_lost_node(self, line: str) -> None:
        logger.critical("%s; the instance can't go on", line)
        logging.shutdown()
        os._exit(LOST_NODE_EXIT_CODE)

    def let_loss_be_named(self, error: Exception) -> None:
        """If `error` may come from the loss of a node, let that be said first."""
        if self.rendezvous is not None:
            self.rendezvous.let_loss_be_named(error)

    def _on_instance_end(self) -> None:
        """Node 0 has ended the instance in good order: so does this node."""
        os.kill(os.getpid(), signal.SIGTERM)

    def close(self) -> None:
        """Withdraw the weights and leave the other ranks."""
        if self.runner is not None:
            self.runner.close()
        if self.rendezvous is not None:
            if self.parallel.world_rank == 0:
                self.rendezvous.end()
            self.rendezvous.close()
        if self._channel is not None:
            self._channel.close()
        if self._plans is not None:
            self._plans.close()


def _tcp_address(host: str) -> str:
    return f"tcp://[{host}]:*" if ":" in host else f"tcp://{host}:*"
