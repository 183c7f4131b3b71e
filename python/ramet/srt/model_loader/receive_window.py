"""Owns the addresses through which a transport fills an arena, and which can be cut off from it at any moment."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from ramet.srt.model_loader import host_memory
from ramet.srt.model_loader.sources.file_reader import scatter_rows
from ramet.srt.model_loader.transfer_plan import CopyOp
from ramet.srt.model_loader.weight_arena import HostWeightArena
from ramet.srt.model_loader.weight_manifest import align_up


def span_nbytes(op: CopyOp) -> int:
    """Source bytes from the first row's start to the last one's end."""
    return (op.num_rows - 1) * op.source_stride + op.source_row_nbytes


class ReceiveLane(ABC):
    """One peer's way into the arena: its batches pass one after the other.

    A batch's operations are received with all that lies between their rows.
    """

    address: int
    nbytes: int  # of memory of its own, beside the window's; 0 if it has none

    @abstractmethod
    def place(self, batch: Sequence[CopyOp]) -> list[int]:
        """Where each of a batch's operations is to be received."""

    @abstractmethod
    def deliver(self, batch: Sequence[CopyOp]) -> None:
        """Bring a batch that has been received into the arena."""

    @abstractmethod
    def close(self) -> None:
        """Give the addresses back: only when nobody writes to them any more."""


class ReceiveWindow(ABC):
    """What all lanes into an arena share.

    A transfer that was given up may still write when its peer comes back: to the window, which is no part of the
    arena by then. The addresses stay taken for as long as the transport might use them.
    """

    address: int
    nbytes: int  # 0 if all memory is the lanes'

    @abstractmethod
    def populate(self) -> None:
        """Take the window's memory now; may run beside the transfer."""

    @abstractmethod
    def open_lane(self, batch_nbytes: int, staging_nbytes: int) -> ReceiveLane:
        """A lane for batches of at most `batch_nbytes`, of which `staging_nbytes` are in operations of several rows."""

    @abstractmethod
    def finish(self) -> None:
        """Wait until everything delivered is in the arena."""

    @abstractmethod
    def cut_off(self) -> None:
        """Part the window and its lanes from the arena for good; the addresses stay valid."""

    @abstractmethod
    def close(self) -> None:
        """Give the addresses back: only when nobody writes to them any more."""


class HostReceiveWindow(ReceiveWindow):
    """A second mapping of the arena's own memory, which shows throw-away memory once it is cut off."""

    def __init__(self, arena: HostWeightArena) -> None:
        self.nbytes = arena.nbytes
        self.address = host_memory.reserve_addresses(self.nbytes)
        self._arena = arena
        host_memory.map_file_at(self.address, self.nbytes, arena.own_fd, private=False)

    def populate(self) -> None:
        self._arena.populate(self.address)

    def open_lane(self, batch_nbytes: int, staging_nbytes: int) -> ReceiveLane:
        return HostReceiveLane(self.address, self._arena.memory, staging_nbytes)

    def finish(self) -> None:
        """Nothing is under way."""

    def cut_off(self) -> None:
        host_memory.map_nothing_at(self.address, self.nbytes)

    def close(self) -> None:
        host_memory.unmap(self.address, self.nbytes)


class HostReceiveLane(ReceiveLane):
    """An operation of one row goes straight to its place in the window, one of several through memory of the lane."""

    def __init__(self, window_address: int, arena_memory: memoryview, staging_nbytes: int) -> None:
        self._window_address = window_address
        self._arena_memory = arena_memory
        self.nbytes = align_up(staging_nbytes, host_memory.PAGE_BYTES)
        self.address = 0
        if self.nbytes:
            self.address = host_memory.reserve_addresses(self.nbytes)
            host_memory.map_nothing_at(self.address, self.nbytes)
            self._staging = memoryview(host_memory.view_memory(self.address, self.nbytes)).cast("B")

    def place(self, batch: Sequence[CopyOp]) -> list[int]:
        addresses = []
        position = self.address
        for op in batch:
            if op.num_rows == 1:
                addresses.append(self._window_address + op.target_offset)
            else:
                addresses.append(position)
                position += span_nbytes(op)
        return addresses

    def deliver(self, batch: Sequence[CopyOp]) -> None:
        position = 0
        for op in batch:
            if op.num_rows > 1:
                scatter_rows(op, self._arena_memory, self._staging[position : position + span_nbytes(op)])
                position += span_nbytes(op)

    def close(self) -> None:
        if self.nbytes:
            host_memory.unmap(self.address, self.nbytes)
