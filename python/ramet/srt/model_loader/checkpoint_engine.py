"""Owns the engine's side of checkpoint-engine's protocol over ZeroMQ: tensors through a buffer that the sender lends.

PROTOCOL: checkpoint-engine's worker.py and ps.py, 0.4. The engine connects as REP. The sender's pickled messages are
read as data, and answered with b"", or with a line that says what is wrong:

1. a handle of the buffer, a flat uint8 tensor: a function of torch's that opens it, and its arguments
2. any number of lists of {name, shape, dtype, offset}: what lies in the buffer now
3. None: the buffer is not needed any more; and None again: that was all
At any time an exception, which is not answered: the sender gives up.
"""

import contextlib
import dataclasses
import io
import math
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

import torch
import zmq
from zmq.utils.monitor import recv_monitor_message

from ramet.srt.model_loader.tensor_memory import CudaMemory, HeldBytes, PickledTensor
from ramet.srt.model_loader.tensor_pickles import SIZE, read_handle
from ramet.srt.utils.pickled_values import Call, Name, PickleError, is_named, read_values
from ramet.srt.weights.manifest import DTYPE_BYTES, element_size

END_GRACE_S = 5.0  # for the second None, which senders before 0.4 don't send
LAST_WORDS_S = 5.0  # for a sender to give up, once it has been told that something is wrong
MAX_MESSAGE_BYTES = 256 << 20
REFUSED = "a tensor was refused; the answer to the request for this update says why"


class Item(NamedTuple):
    """A tensor in the buffer."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int  # in bytes

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * element_size(self.dtype)


class GoneError(OSError):
    """The sender has closed the connection, or has died."""


class GivenUpError(OSError):
    """The sender has said that it gives up."""


def receive_lent(address: str, gpu_id: int, timeout_s: float) -> Generator[tuple[str, torch.Tensor], None, None]:
    """The tensors that a sender at a socket of this host has, in its buffer.

    Args:
        address: "ipc://…".
        gpu_id: of this rank, whose memory the buffer is in, whatever number the sender has for it; -1: the host's.
        timeout_s: between two messages.

    Raises:
        ValueError: if the sender says something that can't be understood.
        OSError: if it gives up, has gone, or says nothing in time.
    """
    if not address.startswith("ipc://"):
        raise ValueError(f"a buffer is lent to processes of the same host, by ipc://…; got {address!r}")
    with contextlib.closing(_Sender(address, timeout_s)) as sender:
        try:
            yield from _receive(sender, gpu_id)
        except GeneratorExit:
            sender.complain(REFUSED)
            raise
        except (ValueError, RuntimeError) as error:  # of this side; an OSError is of the other one
            sender.complain(str(error))
            raise


def _receive(sender: "_Sender", gpu_id: int) -> Generator[tuple[str, torch.Tensor], None, None]:
    buffer = _open(sender.receive(read_handle), gpu_id)
    sender.acknowledge()
    shown = buffer
    while (message := sender.receive(_read_step)) is not None:
        for item in _items(message, buffer.numel()):
            shown = _typed(buffer[item.offset : item.offset + item.nbytes], item)
            yield item.name, shown
        sender.acknowledge()
    # Whoever has got the last one may have it still; the memory is the sender's.
    shown.set_(torch.UntypedStorage(0, device=shown.device))
    del buffer
    sender.acknowledge()
    sender.end()


class _Sender:
    """The talk with the other side, which may end at any time."""

    def __init__(self, address: str, timeout_s: float):
        self._timeout_s = timeout_s
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.REP)
        self._socket.setsockopt(zmq.LINGER, 1000)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        self._owes_answer = False
        try:
            self._socket.connect(address)
        except zmq.ZMQError as error:
            self.close()
            raise OSError(f"{address} can't be used: {error.strerror}") from None

    def receive(self, read: Callable[[bytes], Any]) -> Any:
        """The next message. Raises OSError if none comes."""
        message = self._next(self._timeout_s)
        if message is None:
            raise OSError(f"the sender has said nothing within {self._timeout_s:g} s")
        self._owes_answer = True
        try:
            return read(message)
        except PickleError as error:
            raise PickleError(f"the sender's message can't be read: {error}") from None
        except GivenUpError:
            self._owes_answer = False
            raise

    def acknowledge(self) -> None:
        self._socket.send(b"")
        self._owes_answer = False

    def end(self) -> None:
        """Take the last message and answer it; one that does not come, or a sender that has gone, is an end as well.

        Raises:
            OSError: if the sender gives up instead.
        """
        try:
            message = self._next(END_GRACE_S)
        except GoneError:
            return
        if message is not None:
            self._owes_answer = True
            if _read_step(message) is not None:
                raise PickleError("the sender has sent more tensors after its last")
            self.acknowledge()

    def complain(self, words: str) -> None:
        """Say what is wrong, and hear that the sender gives up."""
        if self._owes_answer:
            self._owes_answer = False
            with contextlib.suppress(OSError, zmq.ZMQError):
                self._socket.send_string(words)
                self._next(LAST_WORDS_S)

    def close(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close()
        self._socket.close()
        self._context.term()

    def _next(self, timeout_s: float) -> bytes | None:
        """A message; None if none comes in time. Raises OSError if the other side has closed the connection."""
        ready = dict(self._poller.poll(int(timeout_s * 1000)))
        if self._socket in ready:
            return self._socket.recv()
        if self._monitor in ready:
            recv_monitor_message(self._monitor)
            raise GoneError("the sender has gone")
        return None


def _read_step(message: bytes) -> Any:
    """A list, or None. Raises PickleError if it is neither, GivenUpError if it is an exception."""
    value = read_values(io.BytesIO(message), _is_known)
    if isinstance(value, Call) and _is_exception(value.function):
        words = " ".join(str(one) for one in value.args if isinstance(one, str | int))
        raise GivenUpError(f"the sender has given up: {value.function.name}: {words[:500]}")
    return value


def _is_known(name: Name) -> bool:
    return _is_exception(name) or name == SIZE or (name.module == "torch" and name.name in DTYPE_BYTES)


def _is_exception(name: Name) -> bool:
    """By its name alone: none is looked up."""
    return name.name.endswith(("Error", "Exception"))


def _open(handle: PickledTensor, gpu_id: int) -> torch.Tensor:
    """The buffer: uint8, [nbytes]. Raises ValueError if it is something else, or where it does not belong."""
    if handle.dtype != "uint8" or len(handle.size) != 1 or handle.stride != (1,):
        raise ValueError("the sender's buffer is no flat tensor of uint8")
    if isinstance(handle.memory, HeldBytes):
        raise ValueError("the sender's buffer came as a copy: on CPUs it must be shared with the strategy file_system")
    is_lent = isinstance(handle.memory, CudaMemory)
    if is_lent != (gpu_id >= 0):
        raise ValueError(
            f"the sender's buffer is {'on a GPU' if is_lent else 'on the host'}, this rank's weights are not"
        )
    if isinstance(handle.memory, CudaMemory):  # the sender may see other GPUs, or the same ones in another order
        handle = dataclasses.replace(handle, memory=dataclasses.replace(handle.memory, device=gpu_id))
    buffer = handle.open(takes_over=True)
    if buffer.is_cuda:
        torch.cuda.current_stream(buffer.device).synchronize()
    return buffer


def _items(message: Any, buffer_nbytes: int) -> list[Item]:
    """What a list says. Raises PickleError if it is none, or something lies outside of the buffer."""
    if not isinstance(message, list):
        raise PickleError("the sender has sent something else than a list of tensors")
    items = []
    for one in message:
        if not isinstance(one, dict) or not {"name", "shape", "dtype", "offset"} <= set(one):
            raise PickleError("the sender's list has something else than name, shape, dtype and offset")
        items.append(_item(one))
        if items[-1].offset + items[-1].nbytes > buffer_nbytes:
            raise PickleError(f"{items[-1].name} reaches beyond the sender's buffer of {buffer_nbytes} bytes")
    return items


def _item(one: dict[str, Any]) -> Item:
    name, shape, dtype, offset = one["name"], one["shape"], one["dtype"], one["offset"]
    if is_named(shape, (SIZE,)):
        (shape,) = shape.args
    is_shape = isinstance(shape, tuple | list) and all(type(extent) is int and extent >= 0 for extent in shape)
    is_dtype = isinstance(dtype, Name) and dtype.module == "torch" and dtype.name in DTYPE_BYTES
    if not isinstance(name, str) or not is_shape or not is_dtype or type(offset) is not int or offset < 0:
        raise PickleError("the sender's list has a tensor without a name, shape, type or offset")
    return Item(name, dtype.name, tuple(shape), offset)


def _typed(content: torch.Tensor, item: Item) -> torch.Tensor:
    """Bytes as what they are; copied where they stand at an offset that no tensor of that type may have."""
    if item.offset % element_size(item.dtype):
        content = content.clone()
    return content.view(getattr(torch, item.dtype)).view(item.shape)
