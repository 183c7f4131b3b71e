"""Owns the phases of an instance's start: when each ended, in seconds since the launch."""

import logging
import os
import time

logger = logging.getLogger(__name__)


class Progress:
    """Phase name -> seconds from the launch to its end, in the order in which they ended."""

    def __init__(self, launch_time: float):
        self.launch_time = launch_time  # unix seconds
        self.phases: dict[str, float] = {}

    def mark(self, phase: str) -> None:
        """`phase` has ended now."""
        self.phases[phase] = round(time.time() - self.launch_time, 3)
        logger.debug("start-up: %s after %.3f s", phase, self.phases[phase])

    def merge(self, prefix: str, phases: dict[str, float]) -> None:
        """Add another process's phases of the same launch."""
        self.phases.update({f"{prefix}.{name}": seconds for name, seconds in phases.items()})


def process_start_time() -> float:
    """When this process was started, in unix seconds: what a launch is measured from. Source: proc(5), `starttime`."""
    with open("/proc/self/stat", encoding="ascii", errors="replace") as stream:
        after_name = stream.read().rsplit(")", 1)[1].split()
    with open("/proc/uptime", encoding="ascii") as stream:
        uptime_s = float(stream.read().split()[0])
    age_s = uptime_s - int(after_name[19]) / os.sysconf("SC_CLK_TCK")
    return time.time() - max(0.0, age_s)
