"""`ramet.launch_server` with the fake scheduler in the place of the real one."""

import sys

from ramet.srt.command_line import parse_server_args
from ramet.srt.entrypoints.launch import launch
from ramet.srt.observability.progress import process_start_time

if __name__ == "__main__":
    sys.exit(launch(parse_server_args(sys.argv[1:]), process_start_time(), "fake_scheduler"))
