"""Owns the two errors with which a request can end: the client's mistake, and a service that can't answer."""


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
