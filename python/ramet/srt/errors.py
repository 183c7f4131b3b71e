"""Owns the two errors with which a request can end: the client's mistake, and a service that can't answer."""

import re


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


def one_line(error: BaseException) -> str:
    """What went wrong, for a user, in one line."""
    text = " ".join(_TORCH_ADVICE.split(str(error))[0].split())
    if text.startswith("CUDA out of memory"):
        text += " (a lower --mem-fraction-static or --max-total-tokens leaves more beside the KV cache)"
    return text or type(error).__name__
