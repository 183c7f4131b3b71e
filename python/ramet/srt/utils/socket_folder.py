"""Owns the folder for the Unix sockets between an instance's processes: private, and gone with the instance.

Abstract sockets would leave nothing behind, but have no permissions: every user of the host could connect to them.
"""

import contextlib
import fcntl
import logging
import os
import re
import shutil
import stat
import tempfile

logger = logging.getLogger(__name__)

PREFIX = "ramet."  # short: a socket's path has room for little more than 100 characters
NAME = re.compile(re.escape(PREFIX) + "[a-z0-9_]{8}")  # as mkdtemp makes them


class SocketFolder:
    """A new folder that only this user may enter. Whoever made it holds a lock on it for as long as it lives.

    Of an instance that was killed the folder stays, but not the lock: the next one that starts removes it.
    """

    def __init__(self) -> None:
        remove_abandoned_folders()
        while True:
            self.path = tempfile.mkdtemp(prefix=PREFIX)
            try:
                self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
            except FileNotFoundError:
                continue  # another start took it for an abandoned one
            try:
                if _lock(self._fd) and _is_at(self.path, self._fd):
                    return
            except OSError as error:  # then nobody else can lock it, and remove it, either
                logger.debug("%s can't be locked: %s", self.path, error)
                return
            os.close(self._fd)  # the same, a moment later

    def close(self) -> None:
        """Remove the folder. Idempotent."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def remove_abandoned_folders() -> None:
    """Remove this user's folders that nobody holds any more."""
    with contextlib.suppress(OSError), os.scandir(tempfile.gettempdir()) as entries:
        for entry in entries:
            if NAME.fullmatch(entry.name):
                with contextlib.suppress(OSError):  # its owner is faster, or the file system knows no locks
                    _remove_if_abandoned(entry.path)


def _remove_if_abandoned(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        status = os.fstat(fd)
        if status.st_uid == os.geteuid() and stat.S_IMODE(status.st_mode) == 0o700 and _lock(fd):
            logger.debug("removing %s: the instance was killed", path)
            shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(fd)


def _lock(fd: int) -> bool:
    """False if somebody else holds it. Raises OSError if the file system knows no locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(path: str, fd: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(fd))
    except FileNotFoundError:
        return False
