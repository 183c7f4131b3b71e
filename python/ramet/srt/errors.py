"""Owns the two errors with which a request can end, and what an error, or a process's limit, says in one line."""

import errno
import re
import resource


class RequestError(ValueError):
    """Something in a request is wrong; `param` names it as the client wrote it."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, status_code: int = 400):
        super().__init__(message)
        self.param = param
        self.code = code
        self.status_code = status_code


class ServiceError(RuntimeError):
    """The instance can't answer a request that may be fine: it is loading, full, stopping or broken."""

    def __init__(self, message: str, *, status_code: int = 503):
        super().__init__(message)
        self.status_code = status_code


# What torch says behind an error: advice to its own developers, stack traces, and a setting that rules CUDA IPC out.
_TORCH_ADVICE = re.compile(
    r"Search for `|CUDA kernel errors might|For debugging consider|Exception raised from|If reserved but unallocated"
)


_OUT_OF_MEMORY = re.compile(
    r"bad_alloc|not enough memory|annot allocate memory|can't allocate memory|nable to allocate"
)
_OUT_OF_THREADS = re.compile(r"can't start new thread|pthread_create failed|Resource temporarily unavailable")


def one_line(error: BaseException) -> str:
    """What went wrong, for a user, in one line; with the limit that was met, if there is one."""
    text = " ".join(_TORCH_ADVICE.split(str(error))[0].split())
    if text.startswith("CUDA out of memory"):
        text += " (a lower --mem-fraction-static or --max-total-tokens leaves more beside the KV cache)"
    advice = limit_advice(error)
    text = text or type(error).__name__
    return text if advice is None or "ulimit" in text else f"{text} ({advice})"


def limit_advice(error: BaseException) -> str | None:
    """Which limit of the process `error` comes from, and how it is raised; None if it comes from none."""
    text, number = str(error), getattr(error, "errno", None)
    if isinstance(error, MemoryError) or number == errno.ENOMEM or _OUT_OF_MEMORY.search(text):
        flags = "less is needed with a lower --max-total-tokens, --mem-fraction-static or --max-running-requests"
        return "; ".join(filter(None, (address_space_limit(), flags)))
    if number in (errno.EMFILE, errno.ENFILE) or "Too many open files" in text:
        return f"ulimit -n allows a process {resource.getrlimit(resource.RLIMIT_NOFILE)[0]} files"
    if number == errno.EAGAIN or _OUT_OF_THREADS.search(text):
        allowed = _number(resource.getrlimit(resource.RLIMIT_NPROC)[0])
        return f"ulimit -u allows this user {allowed} threads, and a container may allow fewer"
    if number == errno.ENOSPC:
        return "the disk, the folder for temporary files (TMPDIR) or /dev/shm is full"
    return None


def address_space_limit() -> str | None:
    """What `ulimit -v` allows a process, in words; None if it is unlimited."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return None
    return f"ulimit -v allows a process {limit >> 10} kB of addresses, of which libraries alone take over 1000000"


def _number(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else str(limit)
