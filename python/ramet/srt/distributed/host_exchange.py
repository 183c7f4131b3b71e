"""Owns what the ranks of a group on one node exchange over memory that they share, and from which operation on.

The kernels for CPUs move the numbers (layers/cpu_kernels/native/collectives.cpp). A rank has them sooner or later, or
never; until all have, the group's operations go by torch.distributed. All change over at the same operation: the first
rank says its number in the shared memory before it begins the one before, which nobody ends without it.
"""

import ctypes
import logging
import math
import mmap
import os
from collections.abc import Sequence

import torch
import torch.distributed as dist

logger = logging.getLogger(__name__)

HEADER_NBYTES = mmap.PAGESIZE
NUMBER_NBYTES = 8  # in the header; they don't tear
FIRST = 0  # number of the first operation that goes over the memory; 0: not known yet
PROCESSES = 1  # one number for each rank, its process, once that has the kernels
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # that are summed
ENDED, DIFFERS = 2, 3  # see collectives.cpp
Pointer, Size, Int = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
FUNCTIONS = {
    "ramet_exchange_open": (Pointer, [Pointer, Size, Int, Int, ctypes.POINTER(Int), Size]),
    "ramet_exchange_sum": (Int, [Pointer, Int, Pointer, Size]),
    "ramet_exchange_sum_shares": (Int, [Pointer, Int, Pointer, Pointer, ctypes.POINTER(Size)]),
    "ramet_exchange_gather": (Int, [Pointer, Pointer, Pointer, Size, ctypes.POINTER(Size)]),
}

_kernels: ctypes.CDLL | None = None


def use_kernels(library: ctypes.CDLL) -> None:
    """Exchange by these from now on, where all ranks of a group have them. Any thread may say so.

    Raises:
        AttributeError: if the library has none.
    """
    global _kernels
    for name, (result, arguments) in FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    _kernels = library


class HostExchange:
    """One group's exchange on this rank. All ranks call the same operations in the same order, from one thread.

    Args:
        memory: the group's own, zeros at first; mapped by all of its ranks.
        rank: place in the group.
        timeout_s: for another rank to come to an operation.
    """

    def __init__(self, memory: mmap.mmap, rank: int, num_ranks: int, timeout_s: float):
        self._memory = memory
        self._numbers = memoryview(memory)[:HEADER_NBYTES].cast("Q")
        self._rank = rank
        self._num_ranks = num_ranks
        self._timeout_s = timeout_s
        self._num_operations = 0  # that have begun before the exchange was open
        self._library: ctypes.CDLL | None = None
        self._handle: int | None = None

    def takes(self, dtype: torch.dtype, fewest: int) -> bool:
        """Whether the operation that begins now goes over the memory. To be asked once for each, on every rank alike.

        Args:
            fewest: numbers, or rows, that a rank brings along. For a rank without any nobody waits.
        """
        if dtype not in DTYPES or fewest == 0:
            return False
        return self._library is not None or self._opens()

    def _opens(self) -> bool:
        """Count an operation; whether the exchange is open from it on."""
        numbers = self._numbers
        self._num_operations += 1
        if _kernels is None:
            return False
        processes = slice(PROCESSES, PROCESSES + self._num_ranks)
        numbers[PROCESSES + self._rank] = os.getpid()
        if self._rank == 0 and not numbers[FIRST] and all(numbers[processes]):
            numbers[FIRST] = self._num_operations + 1
        if not 0 < numbers[FIRST] <= self._num_operations:
            return False
        self._open(_kernels, numbers[processes].tolist())
        return True

    def _open(self, library: ctypes.CDLL, processes: Sequence[int]) -> None:
        descriptors = (Int * self._num_ranks)(*map(_watch, processes))
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._memory)) + HEADER_NBYTES
        nbytes, timeout_ms = len(self._memory) - HEADER_NBYTES, int(self._timeout_s * 1000)
        handle = library.ramet_exchange_open(start, nbytes, self._rank, self._num_ranks, descriptors, timeout_ms)
        if not handle:
            raise MemoryError(f"there is no memory for what {self._num_ranks} ranks exchange")
        self._library, self._handle = library, handle
        logger.info("from now on %d ranks of this node add up over shared memory", self._num_ranks)

    def sum(self, tensor: torch.Tensor) -> None:
        """Sum `tensor` over the ranks, in float32 and in their order, in place.

        Raises:
            dist.DistError: if a rank does not come; so do all operations.
        """
        assert self._library is not None
        whole = tensor.contiguous()
        dtype = DTYPES[tensor.dtype]
        self._check(self._library.ramet_exchange_sum(self._handle, dtype, whole.data_ptr(), whole.numel()))
        if whole is not tensor:
            tensor.copy_(whole)

    def sum_shares(self, tensor: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """The sum over the ranks of this rank's share of `tensor`'s rows, [sizes[rank], ...].

        Args:
            tensor: [sum of sizes, ...], a share for each rank.
        """
        assert self._library is not None
        out = tensor.new_empty((sizes[self._rank], *tensor.shape[1:]))
        row_len = math.prod(tensor.shape[1:])
        counts = (Size * self._num_ranks)(*(size * row_len for size in sizes))
        whole, dtype = tensor.contiguous(), DTYPES[tensor.dtype]
        call = self._library.ramet_exchange_sum_shares
        self._check(call(self._handle, dtype, whole.data_ptr(), out.data_ptr(), counts))
        return out

    def gather_columns(self, tensor: torch.Tensor) -> torch.Tensor:
        """[..., n] of every rank, one's columns behind the other's: [..., n * num_ranks]."""
        width = tensor.shape[-1]
        out = tensor.new_empty((*tensor.shape[:-1], width * self._num_ranks))
        self._gather(tensor, out, tensor.numel() // width, [width] * self._num_ranks)
        return out

    def gather_rows(self, tensor: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """[sizes[rank], ...] of every rank, one behind the other: [sum of sizes, ...]."""
        out = tensor.new_empty((sum(sizes), *tensor.shape[1:]))
        row_len = math.prod(tensor.shape[1:])
        self._gather(tensor, out, 1, [size * row_len for size in sizes])
        return out

    def _gather(self, tensor: torch.Tensor, out: torch.Tensor, num_rows: int, widths: Sequence[int]) -> None:
        assert self._library is not None
        whole, size = tensor.contiguous(), tensor.element_size()
        nbytes = (Size * self._num_ranks)(*(width * size for width in widths))
        call = self._library.ramet_exchange_gather
        self._check(call(self._handle, whole.data_ptr(), out.data_ptr(), num_rows, nbytes))

    def _check(self, code: int) -> None:
        if code == 0:
            return
        failure, rank = divmod(code, 1 << 16)
        who = f"rank {rank} of {self._num_ranks} (process {self._numbers[PROCESSES + rank]})"
        if failure == ENDED:
            raise dist.DistNetworkError(f"{who} has ended")
        if failure == DIFFERS:
            raise dist.DistError(f"{who} is at another operation than rank {self._rank}")
        raise dist.DistError(f"{who} did not come to an operation within {self._timeout_s:g} s (--dist-timeout)")


def _watch(process: int) -> int:
    """A descriptor by which the end of a process is seen; -1 where the system gives none, and the launcher sees it."""
    try:
        return os.pidfd_open(process)
    except OSError as error:
        logger.debug("the end of process %d can't be watched: %s", process, error)
        return -1
