"""Owns the memory that the ranks of one node share to exchange numbers: whose part lies where. No torch.

The launcher makes it and the ranks inherit it: it has no name, and ends with the last of these processes.
"""

import mmap
from collections.abc import Sequence
from dataclasses import dataclass, field

from ramet.srt.utils.host_memory import create_memfd

RANK_NBYTES = 1 << 20  # of each rank in each of its groups; of two slots in turn, and memory only once it is used
MOST_GROUPS = 3  # that a rank exchanges numbers in, see parallel_state.py


@dataclass
class NodeMemory:
    """A node's memory, cut into one piece for each group whose ranks are all on it.

    Args:
        fd: of the memory, from the launcher.
        ranks: of the node, their world ranks.
    """

    fd: int
    ranks: Sequence[int]
    _end: int = field(default=0, init=False)  # of what has been cut off

    @staticmethod
    def create(num_ranks: int) -> int:
        """The descriptor of new memory for so many ranks. It is inherited by processes that it is passed on to.

        Raises:
            OSError: if the system has none.
        """
        return create_memfd("ramet-exchange", num_ranks * MOST_GROUPS * RANK_NBYTES)

    def cut(self, group: Sequence[int]) -> tuple[int, int] | None:
        """The first byte and the length of a group's piece; None for ranks of several nodes.

        Every rank of the node asks for the same groups in the same order, also for those that it isn't in.
        """
        if not set(group) <= set(self.ranks):
            return None
        start, nbytes = self._end, len(group) * RANK_NBYTES
        self._end += nbytes
        return start, nbytes

    def map(self, piece: tuple[int, int]) -> mmap.mmap:
        start, nbytes = piece
        return mmap.mmap(self.fd, nbytes, offset=start)
