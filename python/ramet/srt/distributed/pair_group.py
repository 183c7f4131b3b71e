"""Owns a group of two processes of different instances, one of which sends weights to the other. Not a default group.

The side that sends is rank 0 and holds the store at which both meet. Names are given, never made from a host's name.
"""

import contextlib
import datetime
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
import torch.distributed as dist

from ramet.srt.utils.net import choose_interface, listen_on

SENDER, RECEIVER = 0, 1
POLL_S = 0.0001
_nccl_options_lock = threading.Lock()


def listen(host: str, port: int) -> socket.socket:
    """A socket of this node at which the other side will find a group's store, at that address and nowhere else.

    Args:
        port: 0 takes a free one.

    Raises:
        OSError: if the port is in use, or there is no such address.
    """
    try:
        return listen_on(host, port)
    except OSError as error:
        raise OSError(f"port {port} of {host} can't be used: {error.strerror}") from None


def wait_for_client(listener: socket.socket, timeout_s: float) -> bool:
    """Whether somebody connects within `timeout_s`. The connection waits for the store."""
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    return bool(poll.poll(1000 * timeout_s))


def open_store(listener: socket.socket, host: str, timeout_s: float) -> dist.TCPStore:
    """The store of a group, at a socket that is given back with the object.

    Args:
        host: the address of this node that the socket is bound to.

    Raises:
        OSError: if it doesn't start.
    """
    port = listener.getsockname()[1]
    try:
        return dist.TCPStore(
            host,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=datetime.timedelta(seconds=timeout_s),
            master_listen_fd=listener.detach(),
        )
    except (dist.DistError, RuntimeError) as error:
        raise OSError(f"port {port} of {host} can't be used: {_first_line(error)}") from None


def connect(host: str, port: int, timeout_s: float) -> dist.TCPStore:
    """The store that the other side holds. Raises OSError if it can't be reached in time."""
    try:
        timeout = datetime.timedelta(seconds=timeout_s)
        return dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
    except (dist.DistError, RuntimeError) as error:
        raise OSError(f"{host}:{port} can't be reached: {_first_line(error)}") from None


class _Group(Protocol):
    """What is used of torch's groups; its stubs don't have it."""

    def broadcast(self, tensors: list[torch.Tensor], options: dist.BroadcastOptions, /) -> dist.Work: ...
    def allreduce(self, tensors: list[torch.Tensor], /) -> dist.Work: ...
    def barrier(self) -> dist.Work: ...
    def shutdown(self) -> None: ...
    def abort(self) -> None: ...


class PairGroup:
    """One of the two sides. Every operation ends within the time limit, well or with an OSError."""

    def __init__(
        self, store: dist.Store, name: str, rank: int, device: torch.device, address: str, timeout_s: float
    ) -> None:
        """Meet the other side.

        Args:
            name: the same on both sides. The keys in the store are those of torch's own groups of this name.
            device: of the tensors; the backend is gloo on the CPU and NCCL on CUDA.
            address: of this node, where gloo or NCCL listens for the other side.
            timeout_s: for meeting, and for each operation.

        Raises:
            OSError: if the other side does not come in time.
        """
        self.timeout_s = timeout_s
        self._device = device
        prefix = dist.PrefixStore(f"{name}/", dist.PrefixStore(name, store))
        prefix = dist.PrefixStore(f"{device.type}/", prefix)
        timeout = datetime.timedelta(seconds=timeout_s)
        self._group: _Group | None  # None when it is closed, so that its sockets and threads go
        try:
            if device.type == "cuda":
                choose_interface(address)  # NCCL takes any other where the first group of a process is this one
                self._group = _make_nccl(prefix, rank, timeout)
            else:
                self._group = _make_gloo(prefix, rank, address, timeout)
        except (dist.DistError, RuntimeError) as error:
            raise OSError(f"the other side has not come within {timeout_s:g} s: {_first_line(error)}") from None

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Send a contiguous tensor, or fill it with what the sender sends.

        Raises:
            OSError: if the other side has gone, or does nothing for too long.
        """
        options = dist.BroadcastOptions()
        options.rootRank = SENDER
        options.timeout = datetime.timedelta(seconds=self.timeout_s)
        self._wait(lambda group: group.broadcast([tensor], options))

    def warm_up(self) -> None:
        """Make the connection now, not with the first broadcast: NCCL takes most of a second for it.

        One byte goes over, so both sides must have agreed on it.

        Raises:
            OSError: as `broadcast` does.
        """
        self.broadcast(torch.zeros(1, dtype=torch.uint8, device=self._device))

    def barrier(self) -> None:
        """Wait for the other side to come here too. Raises OSError as `broadcast` does."""
        if self._device.type == "cuda":
            self._wait(lambda group: group.allreduce([torch.zeros(1, device=self._device)]))
        else:
            self._wait(lambda group: group.barrier())

    def _wait(self, start: Callable[[_Group], dist.Work]) -> None:
        """Start an operation and wait for its end. Raises OSError as `broadcast` does."""
        assert self._group is not None, "the group is closed"
        try:
            with _on_device(self._device):
                work = start(self._group)
                if self._device.type == "cpu":
                    work.wait(datetime.timedelta(seconds=self.timeout_s))
                    return
                deadline = time.monotonic() + self.timeout_s
                while not work.is_completed():
                    if time.monotonic() > deadline:
                        raise TimeoutError(f"no progress within {self.timeout_s:g} s")
                    time.sleep(POLL_S)
                work.wait()  # has ended: this only makes the current stream know
                torch.cuda.current_stream().synchronize()
        except (dist.DistError, RuntimeError) as error:
            raise OSError(f"the other side has gone: {_first_line(error)}") from None

    def close(self, failed: bool = False) -> None:
        """Part from the other side. May be called again.

        Args:
            failed: an operation may still be under way: it is broken off.
        """
        group, self._group = self._group, None
        if group is not None and self._device.type == "cuda":
            group.abort() if failed else group.shutdown()


def _make_gloo(store: dist.Store, rank: int, address: str, timeout: datetime.timedelta) -> _Group:
    kind: Any = dist.ProcessGroupGloo
    options = kind._Options()
    options._devices = [kind.create_device(hostname=address)]
    options._timeout = timeout
    return kind(store, rank, 2, options)


def _make_nccl(store: dist.Store, rank: int, timeout: datetime.timedelta) -> _Group:
    kind: Any = dist.ProcessGroupNCCL
    options = kind.Options()
    options._timeout = timeout
    # By default torch ends the whole process when a peer is lost. Here the peer is of another instance: its end is
    # an error of one transfer, which `PairGroup` finds by its own deadlines.
    with _nccl_options_lock, _environment(TORCH_NCCL_ASYNC_ERROR_HANDLING="0", TORCH_NCCL_ENABLE_MONITORING="0"):
        return kind(store, rank, 2, options)


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _on_device(device: torch.device) -> contextlib.AbstractContextManager:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0]
