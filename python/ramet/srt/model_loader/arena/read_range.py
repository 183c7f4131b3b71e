"""Owns reading one range of an open file into memory."""

import os
from collections.abc import Sequence

BLOCK_BYTES = 4 << 20  # buffer of a thread for rows that are gathered or converted


class ShortReadError(OSError):
    """A file ended before a planned range did."""

    def __init__(self, fd_index: int) -> None:
        super().__init__("the file became shorter while it was read")
        self.fd_index = fd_index


def read_range(fds: Sequence[int], index: int, offset: int, into: memoryview) -> None:
    """Fill `into` from an offset of a file."""
    done = 0
    while done < len(into):
        count = os.preadv(fds[index], [into[done:]], offset + done)
        if count == 0:
            raise ShortReadError(index)
        done += count
