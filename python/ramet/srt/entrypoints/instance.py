"""Owns one instance as a whole, without HTTP: its children, its tokenizer manager, its bootstrap server, its end.

The HTTP server and `Engine` are both thin layers over it.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ramet.srt.configs.model_config import ModelConfig
from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.entrypoints.child_processes import SCHEDULER_MODULE, ChildProcesses, LaunchError
from ramet.srt.entrypoints.http.http_counts import HttpCounts
from ramet.srt.entrypoints.modelexpress_start import prepare_modelexpress
from ramet.srt.entrypoints.read_model import read_model
from ramet.srt.entrypoints.traces import trace_start
from ramet.srt.entrypoints.weight_doors import WeightDoors, start_bootstrap
from ramet.srt.errors import RequestError, ServiceError, one_line
from ramet.srt.managers.io_struct import SchedulerReady
from ramet.srt.observability.progress import Progress
from ramet.srt.observability.traces import tracer
from ramet.srt.server_args import ServerArgs
from ramet.srt.utils.hub import resolve_tokenizer_path
from ramet.srt.utils.net import format_url, reachable_host
from ramet.srt.weights.control_messages import InstanceReady, InstanceStopping

if TYPE_CHECKING:
    from ramet.srt.entrypoints.fleet_membership import FleetMembership
    from ramet.srt.entrypoints.openai.reranker import NoReranker, Reranker
    from ramet.srt.entrypoints.version_control import VersionControl
    from ramet.srt.entrypoints.weight_inspection import WeightInspection
    from ramet.srt.lora.adapter_paths import LoraPath
    from ramet.srt.managers.lora_control import LoraControl
    from ramet.srt.managers.metrics import Metrics
    from ramet.srt.managers.pause_control import PauseControl
    from ramet.srt.managers.profile_control import ProfileControl
    from ramet.srt.managers.sleep_control import SleepControl
    from ramet.srt.managers.tokenizer_manager import TokenizerManager
    from ramet.srt.managers.trainer_group_control import TrainerGroupControl
    from ramet.srt.managers.weight_sessions import WeightSessions
    from ramet.srt.managers.weight_update_control import WeightUpdateControl
    from ramet.srt.modelexpress.server.server import ModelExpressServer

logger = logging.getLogger(__name__)

ABORT_TIMEOUT_S = 5.0  # for aborted requests to end after a drain that has taken too long
MODELEXPRESS_GRACE_S = 1.0
NO_WEIGHTS_YET = "no weights have come yet"
SHUTTING_DOWN = "the server is shutting down"


class Instance:
    """One serving instance.

    Its life: `start` in a long-lived thread; on an event loop `open`, `wait_ready` and `close`; `stop_processes`.
    """

    def __init__(self, server_args: ServerArgs, launch_time: float, scheduler_module: str = SCHEDULER_MODULE):
        self.server_args = server_args
        self.progress = Progress(launch_time)
        self.schedulers: list[SchedulerReady] = []
        self.doors = WeightDoors(None, 0, is_listed=False)  # open in an instance that gives its weights
        self.modelexpress: ModelExpressServer | None = None  # the metadata server, if it runs in this process
        self.death: str | None = None  # the one line about the child whose end has ended the instance
        self.manager: TokenizerManager
        self.reranker: Reranker | NoReranker
        self.metrics: Metrics
        self.http_counts = HttpCounts(server_args.model_name)
        self.model_config: ModelConfig
        self.sampling_defaults: dict[str, Any] = {}  # the model's own
        self.lora: LoraControl
        self.pauses: PauseControl
        self.profiles: ProfileControl
        self.versions: VersionControl
        self.weight_updates: WeightUpdateControl
        self.inspection: WeightInspection
        self.weight_sessions: WeightSessions
        self.trainer_groups: TrainerGroupControl
        self.sleep: SleepControl
        self.fleet: FleetMembership | None = None  # of an instance that a metadata server lists
        self._lora_paths: list[LoraPath] = []  # to be loaded before the first request
        self._scheduler_module = scheduler_module
        self._children: ChildProcesses | None = None
        self._receiver: asyncio.Task[None] | None = None
        self._reporting: asyncio.Task[None] | None = None  # to the fleet's server
        self._cloning: asyncio.Task[None] | None = None  # takes cached prefixes
        self._turning: asyncio.Task[None] | None = None  # shows that the event loop does

    @property
    def is_head(self) -> bool:
        """Whether this is the node that serves users."""
        return self.server_args.node_rank == 0

    def refusal(self) -> str | None:
        """Why nothing at all can be answered now: the instance is not up yet, or is dead. None when it is up."""
        return self.death if self.schedulers else "the model is still loading"

    @property
    def doubt(self) -> str | None:
        """Why /health should not send requests here: a process has not moved for a while. None if all move."""
        return None if self._children is None else self._children.doubt

    def warm_up(self) -> None:
        """Start the children before anybody knows the model: `take` says which it is, and then comes `start`.

        Raises:
            LaunchError: if a process can't be started.
        """
        self._children = ChildProcesses(self._scheduler_module)
        self._children.start(self.server_args, self.progress.launch_time, None, as_spares=True)

    def wait_warm(self, on_death: Callable[[str], None]) -> None:
        """Wait until nothing but a model is missing.

        Args:
            on_death: called with one line, in some thread, when a child ends from now on.

        Raises:
            LaunchError: if a child can't do its part.
        """
        assert self._children is not None
        self._children.wait_warm()
        self._children.watch_spares(on_death)

    def take(self, server_args: ServerArgs, launch_time: float) -> None:
        """What an instance that was warmed up is to be. Children of other sizes than it was warmed up for are ended."""
        if self._children is not None and server_args.sizes != self.server_args.sizes:
            self._children.stop()
            self._children = None
        self.server_args, self.progress = server_args, Progress(launch_time)
        self.http_counts.model_name = server_args.model_name

    def start(self) -> None:
        """Check the model folder and start the children. Imports little: what follows can overlap with their start.

        Raises:
            ValueError: if the model folder or its config is wrong, or a package is missing.
            LaunchError: if a process can't be started.
        """
        args = self.server_args
        self.model_config, self.sampling_defaults = read_model(args)
        if args.has_lora:
            from ramet.srt.entrypoints.start_adapters import read_lora_paths

            self._lora_paths, self.server_args = read_lora_paths(args)
            args = self.server_args
        if args.modelexpress is not None:
            self.modelexpress, self.server_args = prepare_modelexpress(args, args.modelexpress)
        bootstrap_url = None
        if args.is_seed and self.is_head:
            bootstrap, self.server_args = start_bootstrap(self.server_args)
            self.doors = WeightDoors(bootstrap, args.world_size, is_listed=args.modelexpress is not None)
            bootstrap_url = bootstrap.url
        elif args.is_seed:
            bootstrap_url = format_url(args.head_host, args.engine_info_bootstrap_port)
        if self._children is not None:
            self._children.give_orders(self.server_args, self.progress.launch_time, bootstrap_url)
        else:
            self._children = ChildProcesses(self._scheduler_module)
            self._children.start(self.server_args, self.progress.launch_time, bootstrap_url)
        self.progress.mark("children started")

    def open(self, on_death: Callable[[str], None], on_end: Callable[[], None] | None = None) -> None:
        """Make the tokenizer manager on the running event loop, and call `on_death` there when a child ends.

        Args:
            on_end: called there when another node ends the instance in good order: on node 0 when one was told to end,
                so that requests may still end; on others when node 0 has ended.

        Raises:
            ValueError: if the tokenizer can't be read.
            LaunchError: if the sockets between the processes can't be opened.
        """
        loop = asyncio.get_running_loop()

        def take_death(line: str) -> None:
            if self.death is None:  # what dies after the first one dies of it
                self.death = line
                self.fail_requests()
                on_death(line)

        def report_death(line: str) -> None:
            loop.call_soon_threadsafe(take_death, line)

        def report_end() -> None:
            assert on_end is not None
            loop.call_soon_threadsafe(on_end)

        def report_asked(node: int) -> None:
            drain_s = self.server_args.drain_timeout
            logger.info("node %d was told to end: running requests may end within %g s", node, drain_s)
            report_end()

        assert self._children is not None
        self._turning = loop.create_task(self._children.follow_loop())
        self._on_death = report_death
        self._on_end = None if on_end is None else report_end
        self._on_asked = None if on_end is None else report_asked
        if self.is_head:
            self._open_manager()

    def _open_manager(self) -> None:
        import zmq

        from ramet.srt.entrypoints.openai.reranker import find_reranker
        from ramet.srt.entrypoints.version_control import VersionControl
        from ramet.srt.entrypoints.weight_inspection import WeightInspection
        from ramet.srt.managers.lora_control import LoraControl
        from ramet.srt.managers.metrics import Metrics
        from ramet.srt.managers.pause_control import PauseControl
        from ramet.srt.managers.prepare_requests import Limits
        from ramet.srt.managers.profile_control import ProfileControl
        from ramet.srt.managers.sleep_control import SleepControl
        from ramet.srt.managers.tokenizer_manager import TokenizerManager
        from ramet.srt.managers.trainer_group_control import TrainerGroupControl
        from ramet.srt.managers.weight_sessions import WeightSessions
        from ramet.srt.managers.weight_update_control import WeightUpdateControl
        from ramet.srt.text.output_format import OutputFormat
        from ramet.srt.text.tokenizer import Tokenizer

        assert self._children is not None
        args = self.server_args
        path = resolve_tokenizer_path(args.tokenizer_path, args.model_path, args.revision)
        tokenizer = Tokenizer.from_path(path, args.chat_template)
        if tokenizer.chat_template is not None and args.chat_template is not None:
            tokenizer.chat_template.compile()
        form = OutputFormat(tokenizer, args.parser_config)
        logger.info("tool calls: %s, reasoning: %s", form.tool_call_parser, form.reasoning_parser)
        vocab_size = self.model_config.vocab_size
        self.reranker = find_reranker(self.model_config.path, args.classifier_labels, tokenizer, vocab_size)
        limits = Limits(
            vocab_size=vocab_size,
            max_req_len=self.model_config.context_len,
            has_eos=bool(self.model_config.eos_token_ids),
            grammars=args.grammar_backend != "none",
            priorities=args.schedule_policy == "priority",
            request_templates=args.trust_request_chat_template,
            sampling_defaults=self.sampling_defaults,
            embedding=self.model_config.embedding,
            hidden_size=self.model_config.hidden_size,
        )
        self.metrics = Metrics(args.model_name)
        self.metrics.registry.register(self.http_counts)
        try:
            self.manager = TokenizerManager(
                tokenizer,
                limits,
                self._children.port_args,
                self.metrics,
                args.load_balance_method,
                output_format=form,
            )
        except zmq.ZMQError as error:
            raise LaunchError(f"the sockets between the processes can't be opened: {one_line(error)}") from None
        self.manager.adapters.also_served = args.model_names[1:]
        self.pauses = PauseControl(self.manager)
        self.profiles = ProfileControl(self.manager)
        world_size, weights_turn = args.world_size, asyncio.Lock()
        self.versions = VersionControl(
            self.manager,
            self.doors.ask_rank,
            world_size if self.doors.gives_weights else 0,
            weights_turn,
            lambda: self.sleep.is_asleep,
        )
        self.lora = LoraControl(
            self.manager,
            args.model_name,
            args.has_lora,
            args.load_config(),
            self.doors.forget_adapter,
            lambda: self.weight_updates.has_session,
        )
        self.weight_updates = WeightUpdateControl(
            self.manager, args.model_path, args.keep_weight_versions, self.doors, self, weights_turn, self.lora.turn
        )
        sizes = ParallelConfig.of_rank(0, tp_size=args.tp_size, pp_size=args.pp_size, dp_size=args.dp_size)
        self.inspection = WeightInspection(self.manager, sizes)
        self.sleep = SleepControl(
            self.manager,
            self.pauses,
            self.weight_updates,
            can_sleep=args.enable_memory_saver,
            keeps_copy=args.enable_weights_cpu_backup,
        )
        self.weight_sessions = WeightSessions(self.weight_updates, args.weight_session_timeout, self.sleep.note_updated)
        self.trainer_groups = TrainerGroupControl(self.manager, self.weight_updates, world_size)
        if args.clone_prefix_cache:
            from ramet.srt.entrypoints.prefix_cloning import prepare

            asyncio.get_running_loop().run_in_executor(None, prepare)
        self._receiver = asyncio.create_task(self.manager.receive_forever())
        self._receiver.add_done_callback(self._receiver_ended)
        self.progress.mark("tokenizer ready")

    async def wait_ready(self, give_up: asyncio.Event) -> bool:
        """Wait until the children can serve, then take requests; False, and no more children, if `give_up` comes first.

        Raises:
            LaunchError: if a child can't serve, or an adapter can't be loaded.
        """
        assert self._children is not None
        ready = asyncio.create_task(asyncio.to_thread(self._children.wait_ready))
        if not await _ends_before(ready, give_up):
            await asyncio.to_thread(self.stop_processes)
            with contextlib.suppress(LaunchError):
                await ready
            return False
        schedulers = await ready
        if self.is_head:
            self._children.watch(self._on_death, on_asked=self._on_asked)
            self.manager.connect(schedulers[0].scheduler_addresses)
            givers = schedulers[0].load_report.instances
            loading = asyncio.create_task(self._load_adapters(givers))
            if not await _ends_before(loading, give_up):
                loading.cancel()
                await asyncio.to_thread(self.stop_processes)
                return False
            await loading
            if self.server_args.clone_prefix_cache and givers:
                await self._clone_prefix_cache(givers)
        else:
            self._children.watch(self._on_death, self._on_end)
        self._start_serving(schedulers)
        return True

    async def _load_adapters(self, givers: Sequence[str]) -> None:
        """Those that are there from the start on. Raises LaunchError if one can't be loaded."""
        from ramet.srt.entrypoints.start_adapters import load_first_adapters

        try:
            await load_first_adapters(self.lora, self._lora_paths, self.server_args, givers)
        except (RequestError, ServiceError) as error:
            raise LaunchError(str(error)) from None

    async def _clone_prefix_cache(self, givers: Sequence[str]) -> None:
        """Begin it; it may go on while the instance serves."""
        from ramet.srt.entrypoints.prefix_cloning import READY_S, clone_prefix_cache

        cloning = clone_prefix_cache(self.manager, self.doors, self.server_args, givers)
        self._cloning = asyncio.create_task(cloning)
        await asyncio.wait([self._cloning], timeout=READY_S)

    def _start_serving(self, schedulers: list[SchedulerReady]) -> None:
        for scheduler in schedulers:
            self.progress.merge(f"rank {scheduler.world_rank}", scheduler.phases)
        self.schedulers = schedulers
        self.progress.mark("ready")
        if (own := tracer()) is not None:
            trace_start(own, self.progress.launch_time, schedulers)
        if self.is_head:
            for scheduler in schedulers:
                self.metrics.observe_load(scheduler.world_rank, scheduler.load_report)
            self.metrics.startup_seconds.set(self.progress.phases["ready"])
            max_req_len = min(scheduler.max_req_len for scheduler in schedulers)
            self.manager.start_accepting(max_req_len, schedulers[0].load_report.weight_version)
            if self.server_args.modelexpress is not None and self.server_args.has_http:
                self._join_fleet()
            if self.server_args.awaits_weights:
                self._await_weights()
                return
        self.doors.tell_ranks(InstanceReady())

    def _join_fleet(self) -> None:
        from ramet.srt.entrypoints.fleet_membership import FleetMembership

        args, model = self.server_args, self.model_config
        self.fleet = FleetMembership(
            args.load_config(dtype=model.dtype, quantization=args.quantization or model.quantization),
            (reachable_host(args.host), args.port),
            self.manager,
            self.pauses,
            self.weight_updates,
            self.sleep,
            may_give=self.doors.gives_weights,
        )
        self._reporting = asyncio.create_task(self.fleet.run())

    def _await_weights(self) -> None:
        """Refuse requests, and tell nobody of the instance, until the first update has been served."""
        self.manager.weights_refusal = NO_WEIGHTS_YET
        self.weight_updates.await_first()
        if self.doors.gives_weights:
            self.doors.close_for_weights()

    def ask_for_end(self) -> bool:
        """Have node 0 end the instance, with this node, once requests have ended; whether that is for node 0 to do."""
        if self.is_head or not self.schedulers:
            return False
        assert self._children is not None
        self._children.ask_for_end()
        return True

    async def drain(self) -> None:
        """Refuse new requests and let the running ones end, for up to --drain-timeout; then abort them.

        A pause ends first, so that those that it holds can end; those that wait for an instance to wake are aborted. A
        profile that is being recorded is written after that, which may take minutes.
        """
        if not self.is_head:
            return
        self.doors.tell_ranks(InstanceStopping())
        self.manager.stop_accepting(SHUTTING_DOWN)
        await self.doors.wait_told()
        if self.sleep.is_asleep:
            self.manager.abort_all()  # what waits for it to wake
        elif self.pauses.is_paused:
            with contextlib.suppress(ServiceError):
                await self.pauses.go_on()
        if not await self.manager.drain(self.server_args.drain_timeout):
            logger.warning("%d sequences still run after --drain-timeout and are aborted", self.manager.num_running)
            self.manager.abort_all()
            if not await self.manager.drain(ABORT_TIMEOUT_S):
                self.manager.fail_all(ServiceError(SHUTTING_DOWN))
                return
        if self.death is None:
            await self.profiles.end()

    def fail_requests(self) -> None:
        """Refuse new requests and give up those that still run: they get an error."""
        if self._receiver is not None:
            reason = self.death or SHUTTING_DOWN
            self.manager.stop_accepting(reason)
            self.manager.fail_all(ServiceError(reason))

    async def close(self) -> None:
        """End the tokenizer manager; requests that still run get an error. Then comes `stop_processes`."""
        self.fail_requests()
        for task in (self._turning, self._reporting, self._cloning):
            if task is not None:
                task.cancel()
        if self._receiver is not None:
            self._receiver.cancel()
            await asyncio.wait([self._receiver])
            self.manager.close()

    def stop_processes(self) -> None:
        """End the children and the bootstrap server. May be called from any thread, and again."""
        if self._children is not None:
            self._children.stop()
        self.doors.shut()
        if self.modelexpress is not None:
            self.modelexpress.close(MODELEXPRESS_GRACE_S)

    def kill_processes(self) -> None:
        """As `stop_processes`, but at once."""
        if self._children is not None:
            self._children.kill()

    # What changes of weights need of it: see weight_update_control.Life

    def end(self, line: str) -> None:
        """The instance can't go on."""
        logger.critical("%s", line)
        self._on_death(line)

    def _receiver_ended(self, task: "asyncio.Task[None]") -> None:
        if not task.cancelled() and task.exception() is not None:
            logger.error("the tokenizer manager failed", exc_info=task.exception())
            self._on_death(f"the tokenizer manager failed: {task.exception()!r}")


async def _ends_before(task: "asyncio.Task[Any]", event: asyncio.Event) -> bool:
    """Wait until one of them has come; whether it is the task that has ended, well or not."""
    waiting = asyncio.create_task(event.wait())
    await asyncio.wait((task, waiting), return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    return task.done()
