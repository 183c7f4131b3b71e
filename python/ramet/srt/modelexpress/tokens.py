"""Owns bearer tokens in files: read again when the file changes, because they are rotated while processes live."""

import hmac
import logging
import os
import threading

logger = logging.getLogger(__name__)


class TokenFile:
    """The tokens in a file, one per line. A client sends the first one, a server accepts each of them."""

    def __init__(self, path: str):
        """
        Raises:
            ValueError: if the file cannot be read or holds no token.
        """
        self.path = path
        self._lock = threading.Lock()
        self._stamp: tuple[int, int, int] | None = None
        self._tokens: list[str] = []
        try:
            self._read()
        except OSError as error:
            raise ValueError(f"cannot read the token file: {error}") from error
        if not self._tokens:
            raise ValueError(f"the token file {path} holds no token")

    def _read(self) -> None:
        status = os.stat(self.path)
        stamp = (status.st_mtime_ns, status.st_ino, status.st_size)
        if stamp == self._stamp:
            return
        with open(self.path, encoding="utf-8") as file:
            lines = [line.strip() for line in file]
        self._stamp = stamp
        self._tokens = [line for line in lines if line]

    def tokens(self) -> list[str]:
        """The tokens in the file now; those that it had last while it cannot be read."""
        with self._lock:
            try:
                self._read()
            except (OSError, UnicodeDecodeError) as error:
                logger.warning("the token file cannot be read, the last tokens stay valid: %s", error)
            return list(self._tokens)

    def first(self) -> str:
        """The token to send; "" if the file has been emptied."""
        return next(iter(self.tokens()), "")

    def accepts(self, authorization: str) -> bool:
        """Whether an authorization header's value is "Bearer" and one of the tokens."""
        scheme, _, token = authorization.partition(" ")
        matches = [hmac.compare_digest(token.strip().encode(), known.encode()) for known in self.tokens()]
        return scheme.lower() == "bearer" and any(matches)
