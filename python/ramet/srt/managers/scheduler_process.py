"""Owns the life of a scheduler process: `python -m ramet.srt.managers.scheduler_process --status-fd N`.

The launcher writes one JSON line to its standard input and reads one message, SchedulerReady or SchedulerFailed,
from the status pipe. Torch is imported here and nowhere above, after the process has tied its life to the launcher's.
"""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ramet.srt.managers.io_struct import SchedulerFailed, SchedulerReady, encode
from ramet.srt.observability.logs import configure_logging
from ramet.srt.utils.child_process import (
    ChildConfig,
    die_with_parent,
    read_child_config,
    send_status,
    status_fd_argument,
)

if TYPE_CHECKING:
    from ramet.srt.managers.scheduler import Scheduler

logger = logging.getLogger(__name__)

WATCHDOG_PERIOD_S = 1.0
WATCHDOG_EXIT_CODE = 70


class StartUp:
    """The clock of the start-up phases."""

    def __init__(self, launch_time: float):
        self.launch_time = launch_time  # unix seconds
        self.phases: dict[str, float] = {}

    def on_phase(self, name: str) -> None:
        """Note that start-up phase `name` has just ended: seconds since the launch of the instance."""
        self.phases[name] = round(time.time() - self.launch_time, 3)


def main(argv: Sequence[str]) -> int:
    """Entry of the process; see the launcher in entrypoints/child_processes.py for what it is given."""
    status_fd = status_fd_argument(argv)
    config = read_child_config()
    die_with_parent(config.parent_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the launcher decides what it means
    world_rank = config.parallel.world_rank
    configure_logging(config.server_args["log_level"], f"scheduler {world_rank}")
    try:
        scheduler, ready = start_scheduler(config)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        logger.debug("start failed", exc_info=True)
        message = str(error).strip() or type(error).__name__
        send_status(status_fd, encode(SchedulerFailed(world_rank=world_rank, message=message)))
        return 1

    def stop(signum: int, frame: Any) -> None:
        scheduler.stopping = True

    signal.signal(signal.SIGTERM, stop)
    threading.Thread(target=watch, args=(scheduler,), name="watchdog", daemon=True).start()
    send_status(status_fd, encode(ready))
    try:
        scheduler.run()
    finally:
        scheduler.channel.close()
        scheduler.model_runner.close()
    return 0


def start_scheduler(config: ChildConfig) -> "tuple[Scheduler, SchedulerReady]":
    """Build everything that the rank needs, warm it up, and let others find its weights.

    Raises:
        ValueError, OSError, MemoryError, RuntimeError: if the rank can't serve; the message says why.
    """
    from ramet.srt.configs.model_config import ModelConfig
    from ramet.srt.managers.scheduler import Scheduler
    from ramet.srt.managers.scheduler_channel import SchedulerChannel
    from ramet.srt.model_executor.model_runner import ModelRunner
    from ramet.srt.sampling.grammar import make_grammar_backend
    from ramet.srt.utils.hub import resolve_model_path
    from ramet.srt.utils.tokenizer import Tokenizer

    start_up = StartUp(config.launch_time)
    start_up.on_phase("imports")
    args = config.make_server_args()
    model_path = resolve_model_path(args.model_path, args.revision, weights=args.load_format != "remote_instance")
    model_config = ModelConfig.from_path(
        model_path,
        model_name=args.model_name,
        revision=args.revision,
        dtype=args.dtype,
        context_length=args.context_length,
    )
    runner = ModelRunner(args, model_config, config.parallel, start_up.on_phase)
    tokenizer = Tokenizer.from_path(resolve_model_path(args.tokenizer_path or model_path, args.revision, weights=False))
    grammar_backend = make_grammar_backend(args.grammar_backend, tokenizer, model_config)
    channel = SchedulerChannel(config.make_port_args())
    scheduler = Scheduler(args, model_config, runner, tokenizer, grammar_backend, channel, config.parent_pid)
    scheduler.warm_up()
    start_up.on_phase("warm_up")
    if config.bootstrap_url is not None:
        runner.publish(config.bootstrap_url)
    start_up.on_phase("ready")
    ready = SchedulerReady(
        world_rank=config.parallel.world_rank,
        max_total_num_tokens=runner.max_total_num_tokens,
        max_running_requests=args.max_running_requests,
        max_req_len=runner.max_req_len,
        load_report=runner.load_report,
        phases=start_up.phases,
    )
    return scheduler, ready


def watch(scheduler: "Scheduler") -> None:
    """End the process when one forward pass takes longer than the watchdog allows: better dead than hanging."""
    limit_s = scheduler.server_args.watchdog_timeout
    while not scheduler.stopping:
        time.sleep(WATCHDOG_PERIOD_S)
        started = scheduler.forward_started
        if started is not None and time.monotonic() - started > limit_s:
            logger.critical("a forward pass has taken more than %.0f s (--watchdog-timeout); giving up", limit_s)
            os._exit(WATCHDOG_EXIT_CODE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
