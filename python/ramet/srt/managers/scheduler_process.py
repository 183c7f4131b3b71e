"""Owns the life of a rank's process: `python -m ramet.srt.managers.scheduler_process --status-fd N`.

The launcher writes one JSON line to its standard input and reads one message, SchedulerReady or SchedulerFailed,
from the status pipe. Torch is imported in managers/rank.py, after the process has tied its life to the launcher's.
"""

import logging
import signal
import sys
from collections.abc import Sequence

import zmq

from ramet.srt.errors import one_line
from ramet.srt.managers.child_process import (
    die_with_parent,
    read_child_config,
    send_status,
    status_fd_argument,
    take_orders,
)
from ramet.srt.managers.io_struct import SchedulerFailed, encode
from ramet.srt.managers.pulse import BoardVoice, LauncherBeats, WatchLimits
from ramet.srt.managers.watchdog import start_pulse
from ramet.srt.observability.logs import configure_logging
from ramet.srt.observability.progress_bar import allow_bars
from ramet.srt.utils.imports import importing, start_gpu

logger = logging.getLogger(__name__)


LOST_RANK_EXIT_CODE = 73


def main(argv: Sequence[str]) -> int:
    """Entry of the process; see the launcher in entrypoints/child_processes.py for what it is given."""
    status_fd = status_fd_argument(argv)
    config = read_child_config()
    die_with_parent(config.parent_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the launcher decides what it means
    world_rank = config.parallel.world_rank
    args_given = config.server_args
    configure_logging(args_given["log_level"], f"scheduler {world_rank}", args_given["log_format"])
    args = config.make_server_args()
    allow_bars(world_rank == args.local_ranks[0] and args.log_format == "text")
    pulse, board = start_pulse(config)
    with importing("torch"):
        if args.device != "cpu":
            start_gpu(args.gpu_id(world_rank))
        from ramet.srt.managers.rank import RankStart

    launcher = LauncherBeats(board, WatchLimits(args.watchdog_timeout).period_s)
    start = RankStart(config, BoardVoice(board, config.slot), launcher.move)
    try:
        if config.is_spare:
            start.warm_up()
            start.take(take_orders(status_fd))
        rank = start.run()
    except (ValueError, OSError, MemoryError, RuntimeError, zmq.ZMQError) as error:
        logger.debug("start failed", exc_info=True)
        start.let_loss_be_named(error)
        send_status(status_fd, encode(SchedulerFailed(world_rank=world_rank, message=one_line(error))))
        return 1
    signal.signal(signal.SIGTERM, lambda _signum, _frame: rank.stop())
    pulse.serve(rank.task_since)
    send_status(status_fd, encode(rank.ready))
    try:
        rank.run()
    except RuntimeError as error:
        if not start.let_loss_be_named(error):
            raise
        logger.error("another rank can't be reached any more: %s", one_line(error))
        return LOST_RANK_EXIT_CODE
    finally:
        rank.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
