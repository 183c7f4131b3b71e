"""Owns the processes of an instance besides the main one: their start, their status, their deaths and their end.

The children's side is managers/child_process.py.
"""

import asyncio
import contextlib
import dataclasses
import io
import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.distributed.node_memory import NodeMemory
from ramet.srt.entrypoints.child_watch import ChildWatch
from ramet.srt.errors import address_space_limit, one_line
from ramet.srt.managers.child_process import WARM, ChildConfig
from ramet.srt.managers.io_struct import (
    DetokenizerFailed,
    DetokenizerReady,
    Message,
    SchedulerFailed,
    SchedulerReady,
    decode,
)
from ramet.srt.managers.port_args import PortArgs
from ramet.srt.server_args import ServerArgs
from ramet.srt.utils.net import address_family, format_address
from ramet.srt.utils.python_path import child_python_path
from ramet.srt.utils.socket_folder import SocketFolder

logger = logging.getLogger(__name__)

SCHEDULER_MODULE = "ramet.srt.managers.scheduler_process"
DETOKENIZER_MODULE = "ramet.srt.managers.detokenizer_manager"
STOP_TIMEOUT_S = 5.0
ENDS_OF_LIBRARIES = (-signal.SIGABRT, -signal.SIGSEGV, -signal.SIGBUS, 127)  # exit codes of some that got no memory
GOMP_SPINCOUNT = "1000"  # turns that an OpenMP thread waits busily before it sleeps: some microseconds
# oneDNN keeps a compiled product of matrices for each number of rows, a megabyte each, and so does torch above it: 1024
# of them unless they are told otherwise.
KEPT_PRODUCTS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256", "LRU_CACHE_CAPACITY": "256"}
DETOKENIZER_SLOT = 1  # on the page on which the processes beat; the ranks' slots come behind it
MAX_SOCKET_PATH = 107  # bytes in a Unix socket's address


class LaunchError(RuntimeError):
    """The instance can't start; the message is one line for its user."""


@dataclass
class Child:
    """One started process and the end of the pipe on which it reports."""

    name: str
    config: ChildConfig
    process: subprocess.Popen[bytes]
    status_pipe: io.FileIO
    status: bytes = b""


class ChildProcesses:
    """All children of one instance. Start them in a thread that lives as long as they shall: they die with it."""

    def __init__(self, scheduler_module: str = SCHEDULER_MODULE):
        self._scheduler_module = scheduler_module
        self._folder = SocketFolder()
        self.port_args = PortArgs.in_directory(self._folder.path)
        self._listeners: list[socket.socket] = []  # behind the addresses that other nodes connect to
        self._children: list[Child] = []
        self._stopping = False
        self._watch: ChildWatch | None = None
        self._exchange: io.FileIO | None = None  # memory over which the ranks add up
        self._lock = threading.Lock()
        longest = f"{self._folder.path}/scheduler-9999"
        if len(os.fsencode(longest)) > MAX_SOCKET_PATH:
            self.stop()
            raise ValueError(f"the temporary folder's path is too long for a socket ({longest}); set TMPDIR to another")

    def start(
        self, server_args: ServerArgs, launch_time: float, bootstrap_url: str | None, *, as_spares: bool = False
    ) -> None:
        """Start the scheduler of every rank of this node, which takes longest, and on node 0 the detokenizer.

        Args:
            as_spares: they do what needs no model, and wait for `give_orders`.

        Raises:
            LaunchError: if a process can't be started.
        """
        args = server_args
        if args.nnodes > 1 and args.node_rank == 0:
            self._listen_for_other_nodes(args.head_host)
        try:
            self._watch = watch = ChildWatch(args, self._kill_all)
            self._exchange = exchange = io.FileIO(NodeMemory.create(len(args.local_ranks)))
        except OSError as error:  # the arenas need it as well
            raise LaunchError(f"memory can't be shared between processes (memfd_create): {one_line(error)}") from None
        config = ChildConfig(
            server_args=dataclasses.asdict(args),
            port_args=self.port_args,
            directory=self._folder.path,
            parallel=ParallelConfig(),
            bootstrap_url=bootstrap_url,
            launch_time=launch_time,
            parent_pid=os.getpid(),
            board_fd=watch.board.fd,
            slot=DETOKENIZER_SLOT,
            exchange_fd=exchange.fileno(),
            is_spare=as_spares,
        )
        for slot, rank in enumerate(args.local_ranks, start=DETOKENIZER_SLOT + 1):
            parallel = ParallelConfig.of_rank(
                rank,
                tp_size=args.tp_size,
                pp_size=args.pp_size,
                dp_size=args.num_replicas,
                ep_size=args.ep_size,
                attn_dp_size=args.attn_dp_size,
            )
            rank_config = msgspec.structs.replace(config, parallel=parallel, slot=slot)
            self._start_one(f"scheduler (rank {rank})", self._scheduler_module, rank_config, (exchange.fileno(),))
        if args.node_rank == 0:
            fds = () if self.port_args.detokenizer_fd is None else (self.port_args.detokenizer_fd,)
            self._start_one("detokenizer", DETOKENIZER_MODULE, config, fds)
        watch.start()

    def _listen_for_other_nodes(self, host: str) -> None:
        """Take TCP ports for the tokenizer manager and the detokenizer, which schedulers on other nodes talk to.

        Raises:
            LaunchError: if `host` is no address of this node.
        """
        addresses = []
        for _ in range(2):
            try:
                listener = socket.create_server((host, 0), family=address_family(host))
            except OSError as error:
                raise LaunchError(f"node 0 can't listen on {host} (--dist-init-addr): {error.strerror}") from None
            self._listeners.append(listener)
            addresses.append(f"tcp://{format_address(host, listener.getsockname()[1])}")
        self.port_args = PortArgs(
            tokenizer_ipc_name=addresses[0],
            detokenizer_ipc_name=addresses[1],
            tokenizer_fd=self._listeners[0].fileno(),
            detokenizer_fd=self._listeners[1].fileno(),
        )

    def _start_one(self, name: str, module: str, config: ChildConfig, fds: tuple[int, ...] = ()) -> None:
        read_fd, write_fd = os.pipe()
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", module, "--status-fd", str(write_fd)],
                stdin=subprocess.PIPE,
                pass_fds=(write_fd, config.board_fd, *fds),
                env=child_environment(child_python_path()),
                process_group=0,  # a Ctrl-C in the terminal is for the main process, which then stops its children
            )
        except OSError as error:
            os.close(read_fd)
            raise LaunchError(f"the {name} can't be started: {one_line(error)}") from None
        finally:
            os.close(write_fd)
        with self._lock:
            self._children.append(child := Child(name, config, process, io.FileIO(read_fd)))
        if self._watch is not None:
            self._watch.add(name, process.pid, config.slot, process.kill)
        _tell(child, config, is_last=not config.is_spare)

    def wait_warm(self) -> None:
        """Wait until nothing but a model is missing to the children that were started as spares.

        Raises:
            LaunchError: as `wait_ready`.
        """
        with self._lock:
            children = list(self._children)
        for child in children:
            if (first := child.status_pipe.read(1)) != WARM:
                child.status = first + child.status_pipe.readall()
                self._status_message(child)

    def give_orders(self, server_args: ServerArgs, launch_time: float, bootstrap_url: str | None) -> None:
        """Tell spares that are warm what they are parts of. What follows is as after `start`."""
        for child in self._children:
            config = msgspec.structs.replace(
                child.config,
                server_args=dataclasses.asdict(server_args),
                bootstrap_url=bootstrap_url,
                launch_time=launch_time,
            )
            _tell(child, config, is_last=True)

    def watch_spares(self, on_death: Callable[[str], None]) -> None:
        """Call `on_death` with one line, in a thread of its own, when a spare ends though nobody has stopped it."""
        self._watch_all(on_death, None)

    def wait_ready(self) -> list[SchedulerReady]:
        """Wait until every child says that it can serve; the schedulers' messages. Ends when a child or `stop` does.

        How long a start may take is for the children to say: each of their waits has a timeout.

        Raises:
            LaunchError: if a child says that it can't serve, or ends without a word.
        """
        ready = []
        with self._lock:
            children = list(self._children)
        with selectors.DefaultSelector() as selector, contextlib.ExitStack() as pipes:
            for child in children:
                pipes.enter_context(child.status_pipe)
                selector.register(child.status_pipe, selectors.EVENT_READ, child)
            while selector.get_map():
                for key, _ in selector.select():
                    chunk = key.data.status_pipe.read(1 << 16)
                    key.data.status += chunk
                    if not chunk:
                        selector.unregister(key.fileobj)
                        message = self._status_message(key.data)
                        if isinstance(message, SchedulerReady):
                            ready.append(message)
        return sorted(ready, key=lambda message: message.world_rank)

    def _status_message(self, child: Child) -> Message:
        if not child.status:
            try:
                return_code: int | None = child.process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                return_code = None
            raise LaunchError(self._verdict or f"the {child.name} {describe_end(return_code)} while starting")
        message = decode(child.status)
        if isinstance(message, SchedulerFailed | DetokenizerFailed):
            raise LaunchError(message.message)
        if not isinstance(message, SchedulerReady | DetokenizerReady):
            raise LaunchError(f"the {child.name} reported a {type(message).__name__} while starting")
        return message

    def watch(
        self,
        on_death: Callable[[str], None],
        on_end: Callable[[], None] | None = None,
        on_asked: Callable[[int], None] | None = None,
    ) -> None:
        """Call `on_death` with one line, in a thread of its own, when a child ends though nobody has stopped it.

        Args:
            on_end: called instead when a child has ended in good order; without it, that is a death too.
            on_asked: called with the number of another node that was told to end.
        """
        if self._watch is not None:
            self._watch.serve(on_asked)
        self._watch_all(on_death, on_end)

    def _watch_all(self, on_death: Callable[[str], None], on_end: Callable[[], None] | None) -> None:
        def wait_for(child: Child) -> None:
            return_code = child.process.wait()
            if self._stopping:
                return
            if return_code == 0 and on_end is not None:
                on_end()
            else:
                line = f"the {child.name}, process {child.process.pid}, {describe_end(return_code)}"
                on_death(self._verdict or line)

        for child in self._children:
            threading.Thread(target=wait_for, args=(child,), name=f"watch {child.name}", daemon=True).start()

    def ask_for_end(self) -> None:
        """Have node 0 end the instance, which this is another node of."""
        if self._watch is not None:
            self._watch.ask_for_end()

    @property
    def doubt(self) -> str | None:
        """A line about a process, on whatever node, that does not move but may still do so; None if all move."""
        return None if self._watch is None else self._watch.doubt

    async def follow_loop(self) -> None:
        """Show, from the event loop that this runs on until it is cancelled, that the loop turns."""
        watch = self._watch
        assert watch is not None
        try:
            while True:
                watch.loop_turned()
                await asyncio.sleep(watch.limits.period_s)
        finally:
            watch.loop_ends()

    @property
    def _verdict(self) -> str | None:
        return None if self._watch is None else self._watch.verdict

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """End every child, at the latest `timeout_s` from now, and remove the sockets. May be called again."""
        self._stopping = True
        if self._watch is not None:
            self._watch.stop_judging()
        with self._lock:
            children, self._children = self._children, []
        for child in children:
            child.process.terminate()
        deadline = time.monotonic() + timeout_s
        for child in children:
            try:
                child.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                logger.warning("the %s has not ended within %g s and is killed", child.name, timeout_s)
                child.process.kill()
                child.process.wait()
        if self._watch is not None:
            self._watch.stop()
        if self._exchange is not None:
            self._exchange.close()
        for listener in self._listeners:
            listener.close()
        self._folder.close()

    def _kill_all(self) -> None:
        with self._lock:
            children = list(self._children)
        for child in children:
            child.process.kill()

    def kill(self) -> None:
        """End every child at once, without asking."""
        self.stop(timeout_s=0.0)


def _tell(child: Child, config: ChildConfig, *, is_last: bool) -> None:
    """Give a child a configuration, and the last one with the end of its input."""
    pipe = child.process.stdin
    assert pipe is not None
    try:
        pipe.write(msgspec.json.encode(config) + b"\n")
        pipe.flush()
        if is_last:
            pipe.close()
    except BrokenPipeError:
        logger.debug("the %s ended before it had its configuration", child.name)


def child_environment(python_path: str) -> dict[str, str]:
    """The environment of a child: this process's, with bounded caches, and threads that sleep when they wait.

    OpenMP's threads spin by default. As soon as another process wants a core, and an instance has three, each of the
    hundreds of short parallel regions of a pass costs a time slice of the kernel.
    """
    waiting = {} if os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} else {"GOMP_SPINCOUNT": GOMP_SPINCOUNT}
    return {**KEPT_PRODUCTS, **os.environ, **waiting, "PYTHONPATH": python_path}


def describe_end(return_code: int | None) -> str:
    """ "was killed by SIGKILL", "ended with exit code 3". With the limit that a library may have met."""
    if return_code is None:
        return "closed its status pipe"
    limit = address_space_limit()
    hint = "" if limit is None or return_code not in ENDS_OF_LIBRARIES else f" ({limit})"
    if return_code >= 0:
        return f"ended with exit code {return_code}{hint}"
    try:
        return f"was killed by {signal.Signals(-return_code).name}{hint}"
    except ValueError:
        return f"was killed by signal {-return_code}"
