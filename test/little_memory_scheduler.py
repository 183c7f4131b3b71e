"""A scheduler process that believes in little memory: beside its weights there is no room for others."""

import os
import sys

from ramet.srt.managers import scheduler_process
from ramet.srt.utils import host_memory

ROOM = 1.5  # arenas


def little_memory_nbytes() -> int:
    """What is left of room for one and a half arenas, by those that this process holds."""
    arenas = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            if "ramet-weights" in os.readlink(f"/proc/self/fd/{fd}"):
                arenas.append(os.fstat(int(fd)))
        except OSError:  # of this very listing
            continue
    size = max(one.st_size for one in arenas)
    return int(ROOM * size) - sum(one.st_blocks * 512 for one in arenas)


if __name__ == "__main__":
    host_memory.available_memory_nbytes = little_memory_nbytes
    sys.exit(scheduler_process.main(sys.argv[1:]))
