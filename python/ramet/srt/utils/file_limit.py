"""Owns the number of files that a process may have open: raising the limit, and how many are left."""

import contextlib
import errno
import logging
import os
import resource

logger = logging.getLogger(__name__)

LOW_LIMIT = 1024  # with fewer files a busy server has to refuse connections
MAX_LIMIT = 1 << 20  # where the hard limit is out of sight


def raise_file_limit() -> int:
    """Raise the soft limit of open files to the hard one; children inherit it. Warns of a low one, and returns it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_LIMIT if hard == resource.RLIM_INFINITY else min(hard, MAX_LIMIT)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # forbidden: then it stays as it is
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    limit = file_limit()
    if limit < LOW_LIMIT:
        logger.warning(
            "this process may have only %d files open (ulimit -n), sockets included: that is few for a server", limit
        )
    return limit


def file_limit() -> int:
    """How many files this process may have open."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MAX_LIMIT if soft == resource.RLIM_INFINITY else soft


def num_free_files() -> int:
    """How many more this process can open now."""
    return max(0, file_limit() - len(os.listdir("/proc/self/fd")))


def is_out_of_files() -> bool:
    """Whether none can be opened now."""
    try:
        os.close(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        return error.errno in (errno.EMFILE, errno.ENFILE)
    return False
