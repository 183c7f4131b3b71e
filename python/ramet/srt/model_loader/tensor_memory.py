"""Owns opening the memory in which another process of the host has tensors. What they are has been checked before."""

import os
import re
import stat
from dataclasses import dataclass
from typing import TypeAlias

import torch

from ramet.srt.utils import cuda_driver
from ramet.srt.utils.device import current_context

SHARED_FOLDER = "/dev/shm"
SHARED_NAME = re.compile(rb"/torch_[0-9]+_[0-9]+(_[0-9]+)?")  # by which torch calls its shared memory
MANAGER_NAME = re.compile(rb"/.+/torch-shm-dir-\w+/manager\.sock")  # of the process that knows who uses it
NUM_COUNTERS = 10_000  # in one file of torch's CUDA IPC
EXPANDABLE = b"e"  # the second byte of a handle, where the sender's memory may be in pieces (CUDACachingAllocator)


@dataclass(frozen=True)
class HeldBytes:
    """Bytes that have come."""

    content: memoryview

    @property
    def nbytes(self) -> int:
        return self.content.nbytes


@dataclass(frozen=True)
class SharedMemory:
    """Memory that torch has shared by a name."""

    manager: bytes
    handle: bytes
    nbytes: int

    def open(self, takes_over: bool) -> torch.UntypedStorage:
        """Raises ValueError if this is not torch's, or not the same user's, or smaller than it is said to be."""
        path = SHARED_FOLDER + self.handle.decode("ascii", "replace")
        if not SHARED_NAME.fullmatch(self.handle) or not MANAGER_NAME.fullmatch(self.manager):
            raise ValueError(f"{path} is no memory that torch has shared")
        manager = self.manager.decode("utf-8", "surrogateescape")
        try:
            found, socket = os.stat(path, follow_symlinks=False), os.stat(manager, follow_symlinks=False)
        except OSError as error:
            raise ValueError(f"the sender's shared memory {path} is gone: {error.strerror}") from None
        if not stat.S_ISREG(found.st_mode) or not stat.S_ISSOCK(socket.st_mode):
            raise ValueError(f"{path} is no memory that torch has shared")
        if {found.st_uid, socket.st_uid} != {os.getuid()}:
            raise ValueError(f"{path} is another user's")
        if found.st_size < self.nbytes:
            raise ValueError(f"{path} has {found.st_size} bytes, not {self.nbytes}")
        storage = torch.UntypedStorage._new_shared_filename_cpu(self.manager, self.handle, self.nbytes)
        if takes_over:
            storage._shared_decref()
        return storage


@dataclass(frozen=True, kw_only=True)
class CudaMemory:
    """A GPU's memory that another process lends; the fields are torch's."""

    device: int | str  # index, or the GPU's UUID
    handle: bytes
    nbytes: int
    offset_nbytes: int
    counter: bytes  # name of the file by which the sender knows when it has its memory back
    counter_place: int
    event: bytes  # the sender's last work on it
    has_event: bool

    def open(self, _takes_over: bool) -> torch.UntypedStorage:
        """Raises ValueError if there is no such GPU, the counter is none of torch's, or the memory ends before that."""
        if not SHARED_NAME.fullmatch(self.counter) or self.counter_place >= NUM_COUNTERS:
            raise ValueError("the counter of lent memory is none of torch's")
        index = self._index()
        storage = torch.UntypedStorage._new_shared_cuda(
            index,
            self.handle,
            self.nbytes,
            self.offset_nbytes,
            self.counter,
            self.counter_place,
            self.event,
            self.has_event,
        )
        self._check_reach(storage.data_ptr() - self.offset_nbytes, index)
        return storage

    def _check_reach(self, base: int, index: int) -> None:
        """torch believes what is said of the memory that a handle opens; behind it lies what is this process's own."""
        is_expandable = self.handle[1:2] == EXPANDABLE
        with current_context(torch.device("cuda", index)):
            reach = cuda_driver.reach_of(base, is_in_pieces=is_expandable)
        if reach is not None and self.offset_nbytes + self.nbytes > reach:
            raise ValueError(
                f"the sender's memory has {reach} bytes, and not {self.nbytes} from {self.offset_nbytes} on"
            )

    def _index(self) -> int:
        num_gpus = torch.cuda.device_count()
        if isinstance(self.device, int):
            known = self.device if 0 <= self.device < num_gpus else None
        else:
            uuids = [str(torch.cuda.get_device_properties(index).uuid) for index in range(num_gpus)]
            known = uuids.index(self.device) if self.device in uuids else None
        if known is None:
            raise ValueError(f"the tensors are on the GPU {self.device}, which is not among this rank's {num_gpus}")
        return known


Memory: TypeAlias = HeldBytes | SharedMemory | CudaMemory


@dataclass(frozen=True)
class PickledTensor:
    """A tensor that has been announced, and lies inside of its memory."""

    memory: Memory
    dtype: str
    offset: int  # in elements, as the strides
    size: tuple[int, ...]
    stride: tuple[int, ...]
    is_of_rank: bool = False  # whether it is one of several, of which each rank opens its own

    def open(self, *, takes_over: bool) -> torch.Tensor:
        """The tensor, in the sender's memory where it is not in the payload.

        Args:
            takes_over: whether this is the one rank that tells the sender that its shared memory has arrived.

        Raises:
            ValueError, RuntimeError, OSError: if it can't be opened.
        """
        dtype, offset = getattr(torch, self.dtype), self.offset
        if 0 in self.size:
            return torch.empty(self.size, dtype=dtype)
        if isinstance(self.memory, HeldBytes):
            stop = offset + 1 + sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))
            content = bytearray(self.memory.content[offset * dtype.itemsize : stop * dtype.itemsize])  # writable
            storage, offset = torch.frombuffer(content, dtype=torch.uint8).untyped_storage(), 0
        else:
            storage = self.memory.open(takes_over)
        return torch.empty(0, dtype=dtype, device=storage.device).set_(storage, offset, self.size, self.stride)
