"""Owns the life of a scheduler process: `python -m ramet.srt.managers.scheduler_process --status-fd N`.

The launcher writes one JSON line to its standard input and reads one message, SchedulerReady or SchedulerFailed,
from the status pipe. Torch is imported here and nowhere above, after the process has tied its life to the launcher's.
"""

import argparse
import json
import logging
import os
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.managers.io_struct import SchedulerFailed, SchedulerReady, encode
from ramet.srt.server_args import PortArgs, ServerArgs
from ramet.srt.utils.child_process import die_with_parent, write_status

if TYPE_CHECKING:
    from ramet.srt.managers.scheduler import Scheduler

logger = logging.getLogger(__name__)

WATCHDOG_PERIOD_S = 1.0
WATCHDOG_EXIT_CODE = 70


class StartUp:
    """What the launcher said, and the clock of the start-up phases."""

    def __init__(self, config: dict[str, Any]):
        self.server_args = ServerArgs(**config["server_args"])
        self.port_args = PortArgs(**config["port_args"])
        self.parallel = ParallelConfig(**config["parallel"])
        self.bootstrap_url: str | None = config["bootstrap_url"]
        self.launch_time: float = config["launch_time"]
        self.phases: dict[str, float] = {}

    def on_phase(self, name: str) -> None:
        """Note that start-up phase `name` has just ended: seconds since the launch of the instance."""
        self.phases[name] = round(time.time() - self.launch_time, 3)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--status-fd", type=int, required=True)
    status_fd = parser.parse_args().status_fd
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the launcher decides what it means
    start_up = StartUp(json.loads(sys.stdin.readline()))
    world_rank = start_up.parallel.world_rank
    logging.basicConfig(
        level=start_up.server_args.log_level.upper(),
        format=f"[%(asctime)s rank{world_rank}] %(levelname)s %(message)s",
        stream=sys.stderr,
    )
    try:
        scheduler, ready = start_scheduler(start_up)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        logger.debug("start failed", exc_info=True)
        message = str(error).strip() or type(error).__name__
        write_status(status_fd, encode(SchedulerFailed(world_rank=world_rank, message=message)))
        sys.exit(1)

    def stop(signum: int, frame: Any) -> None:
        scheduler.stopping = True

    signal.signal(signal.SIGTERM, stop)
    threading.Thread(target=watch, args=(scheduler,), name="watchdog", daemon=True).start()
    write_status(status_fd, encode(ready))
    try:
        scheduler.run()
    finally:
        scheduler.channel.close()
        scheduler.model_runner.close()


def start_scheduler(start_up: StartUp) -> "tuple[Scheduler, SchedulerReady]":
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

    start_up.on_phase("imports")
    args = start_up.server_args
    model_path = resolve_model_path(args.model_path, args.revision)
    model_config = ModelConfig.from_path(
        model_path,
        model_name=args.model_name,
        revision=args.revision,
        dtype=args.dtype,
        context_length=args.context_length,
    )
    runner = ModelRunner(args, model_config, start_up.parallel, start_up.on_phase)
    tokenizer = Tokenizer.from_path(args.tokenizer_path or model_path)
    grammar_backend = make_grammar_backend(args.grammar_backend, tokenizer, model_config)
    channel = SchedulerChannel(start_up.port_args)
    scheduler = Scheduler(args, model_config, runner, tokenizer, grammar_backend, channel)
    scheduler.warm_up()
    start_up.on_phase("warm_up")
    runner.publish(start_up.bootstrap_url)
    start_up.on_phase("ready")
    ready = SchedulerReady(
        world_rank=start_up.parallel.world_rank,
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
    main()
