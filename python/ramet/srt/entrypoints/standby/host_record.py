"""Owns how a user's standbys are found on their host: each has a file with its URL, and a lock on it while it lives.

The folder is of one user alone. What has no lock on it is of a standby that was killed.
"""

import contextlib
import fcntl
import os
import stat
import tempfile
from pathlib import Path

import msgspec

MAX_RECORD_BYTES = 1 << 16


class HostRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One standby of this host."""

    url: str
    device: str  # as it was started: "auto", "cpu", "cuda"


class RecordFile:
    """Of one standby, from its making to `close`.

    Raises:
        OSError: if there can't be one.
    """

    def __init__(self, record: HostRecord):
        while True:
            self._path = _folder() / f"{os.getpid()}.json"
            with contextlib.suppress(FileNotFoundError):  # one that has just ended has removed the empty folder
                self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                break
        fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(self._fd, 0)
        os.write(self._fd, msgspec.json.encode(record))

    def close(self) -> None:
        """Let nobody find it any more."""
        with contextlib.suppress(OSError):
            self._path.unlink()
            self._path.parent.rmdir()  # unless there are others
        os.close(self._fd)


def find_records() -> list[HostRecord]:
    """Of the standbys of this user that live on this host."""
    found = []
    try:
        paths = sorted(_folder(makes=False).glob("*.json"))
    except OSError:
        return []
    for path in paths:
        with contextlib.suppress(OSError, msgspec.DecodeError), path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                found.append(msgspec.json.decode(file.read(MAX_RECORD_BYTES), type=HostRecord))
            else:
                path.unlink()  # nobody holds it
    return found


def _folder(*, makes: bool = True) -> Path:
    """Raises OSError if it is somebody else's, or others may look into it; without `makes`, also if there is none."""
    path = Path(tempfile.gettempdir()) / f"ramet-standbys-{os.getuid()}"
    if makes:
        path.mkdir(mode=0o700, exist_ok=True)
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise PermissionError(f"{path} is not this user's alone")
    return path
