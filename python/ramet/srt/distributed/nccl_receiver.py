"""Owns members of trainers' NCCL groups in the rank's own process, on a stream beside decoding.

All that could hang in NCCL runs in threads of its own, so that whoever waits can give up: the group is aborted then.
"""

import contextlib
import functools
import io
import socket
import time
from collections.abc import Callable
from concurrent.futures import TimeoutError as NotDoneError
from typing import Any, TypeVar

import torch

from ramet.srt.distributed.broadcast_group import ROOT, BroadcastGroup, connect, torch_keys
from ramet.srt.distributed.gloo_receiver import LEFT, guarded
from ramet.srt.distributed.nccl_library import Communicator, load_library
from ramet.srt.distributed.node_pulse import first_line
from ramet.srt.distributed.receiver_messages import Place
from ramet.srt.distributed.trainer_store import wait_for_listener
from ramet.srt.utils.net import local_address
from ramet.srt.utils.pickled_values import Call, Name, PickleError, read_values
from ramet.srt.utils.threads import run_beside

GRACE_S = 3.0  # for a deadline inside of the work to be found there
PROBE_PERIOD_S, PROBE_TIMEOUT_S = 1.0, 2.0
POLL_S = 0.0005
UNIQUE_ID_KEY = "broadcast_from/0/0"  # of vLLM's StatelessProcessGroup: the first object that rank 0 broadcasts
UNPICKLE = Name("_ctypes", "_unpickle")  # what a ctypes structure is pickled as a call of

Result = TypeVar("Result")


class NcclReceiver:
    """A member of a group of torch's: what rank 0 broadcasts comes into the GPU's memory.

    One broadcast at a time. After a failure the group is of no use any more, and is to be closed.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._place: Place | None = None
        self._is_closed = False
        self._probed_at = 0.0
        self._group: BroadcastGroup | None = None

    def join(self, place: Place) -> None:
        """Meet the trainer and the other members; once.

        Raises:
            OSError: if they don't come in time, or the group is left meanwhile.
        """
        self._place = place
        self._within(place.timeout_s, functools.partial(self._join, place, time.monotonic() + place.timeout_s))

    def receive(self, nbytes: int, timeout_s: float) -> torch.Tensor:
        """What the trainer broadcasts next: uint8, [nbytes], nbytes > 0, on the GPU, there for every stream.

        Raises:
            OSError: if it has gone, sends nothing in time, or less than that.
        """
        content = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        self._probed_at = time.monotonic()

        def work() -> None:
            with self._context(), guarded(content):
                self._receive(content, timeout_s)
                if self._stream is not None:
                    self._stream.synchronize()

        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))  # its memory may have been another's
        self._within(timeout_s, work)
        if self._is_closed:  # what was broken off looks as if it had ended
            raise OSError(LEFT)
        return content

    def close(self) -> None:
        """Leave, whatever is waited for. May be called again, from any thread."""
        self._is_closed = True
        run_beside(self._abort, "leave-group")

    def _join(self, place: Place, deadline: float) -> None:
        wait_for_listener(place, deadline, lambda: self._is_closed)
        left_s = max(1.0, deadline - time.monotonic())
        store = connect(place.host, place.port, left_s, place.size)
        keys = torch_keys(store, place.name, self.device.type)
        own = local_address(place.address)
        group = BroadcastGroup(keys, place.rank, place.size, self.device, own, left_s)
        group.check = self._check
        self._group = group
        if self._is_closed:
            self._abort()

    def _receive(self, content: torch.Tensor, timeout_s: float) -> None:
        group = self._group
        if group is None:
            raise OSError(LEFT)
        group.timeout_s = timeout_s
        group.broadcast(content)

    def _abort(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            group.close(failed=True)

    def _check(self) -> None:
        """Now and then: whether the trainer's store is still there. NCCL does not say so where memory is shared."""
        if self._is_closed:
            raise OSError(LEFT)
        if time.monotonic() < self._probed_at + PROBE_PERIOD_S or self._place is None:
            return
        try:
            socket.create_connection((self._place.host, self._place.port), timeout=PROBE_TIMEOUT_S).close()
        except ConnectionRefusedError:
            raise OSError("the trainer has gone") from None
        except OSError:
            pass  # the time limit decides
        self._probed_at = time.monotonic()

    def _context(self) -> contextlib.AbstractContextManager[object]:
        """Around work on the GPU in a thread that begins."""
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _within(self, timeout_s: float, work: Callable[[], Result]) -> Result:
        """What comes of work, or an OSError in time."""
        if self._is_closed:
            raise OSError(LEFT)
        try:
            return run_beside(work, "trainer-group").result(timeout_s + GRACE_S)
        except NotDoneError:
            raise OSError(f"no progress within {timeout_s:g} s") from None
        except RuntimeError as error:
            raise OSError(first_line(error)) from None


class StatelessReceiver(NcclReceiver):
    """A member of a group of vLLM's, without torch: a StatelessProcessGroup's store and a PyNcclCommunicator.

    Args:
        library: NCCL, where it is not the one that torch has.
    """

    def __init__(self, device: torch.device, library: Any = None) -> None:
        super().__init__(device)
        self._library = library
        self._communicator: Communicator | None = None

    def _join(self, place: Place, deadline: float) -> None:
        wait_for_listener(place, deadline, lambda: self._is_closed)
        store = connect(place.host, place.port, max(1.0, deadline - time.monotonic()), place.size)
        unique_id = read_unique_id(store.get(UNIQUE_ID_KEY))
        library = self._library or load_library()
        with self._context():
            left_s = max(1.0, deadline - time.monotonic())
            self._communicator = Communicator(library, unique_id, place.rank, place.size, left_s)
            one = torch.zeros(1, device=self.device)  # a PyNcclCommunicator sums one number up to warm up
            self._communicator.all_reduce(one.data_ptr(), 1, self._stream_handle, left_s)
            self._wait_for_stream(left_s)
        if self._is_closed:
            self._abort()

    def _receive(self, content: torch.Tensor, timeout_s: float) -> None:
        communicator = self._communicator
        if communicator is None:
            raise OSError(LEFT)
        communicator.broadcast(content.data_ptr(), content.nbytes, ROOT, self._stream_handle, timeout_s)
        self._wait_for_stream(timeout_s)

    def _abort(self) -> None:
        communicator, self._communicator = self._communicator, None
        if communicator is not None:
            communicator.abort()

    @property
    def _stream_handle(self) -> int:
        return 0 if self._stream is None else self._stream.cuda_stream

    def _wait_for_stream(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while self._stream is not None and not self._stream.query():
            self._check()
            if self._communicator is not None:
                self._communicator.check()
            if time.monotonic() > deadline:
                raise TimeoutError(f"no progress within {timeout_s:g} s")
            time.sleep(POLL_S)


def _is_known(name: Name) -> bool:
    return name == UNPICKLE or (name.name == "ncclUniqueId" and name.module.startswith("vllm."))


def read_unique_id(data: bytes) -> bytes:
    """The bytes of a pickled ncclUniqueId of vLLM's: a ctypes structure. Raises OSError if it is something else."""
    try:
        made = read_values(io.BytesIO(data), _is_known)
    except PickleError as error:
        raise OSError(f"the trainer's store has something else than a unique id of NCCL's: {error}") from None
    # A structure is made of its kind and its state: its dict, and the bytes.
    match made:
        case Call(function=function, args=(Name(), (_, bytes(content)))) if function == UNPICKLE:
            return content
    raise OSError("the trainer's store has something else than a unique id of NCCL's")
