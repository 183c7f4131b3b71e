"""Owns a group of processes of different instances, of which rank 0 sends and the others receive. Not a default group.

The keys in the store at which they meet are the caller's choice, so that groups of other programs can be joined.
"""

import contextlib
import datetime
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
import torch.distributed as dist

from ramet.srt.distributed.node_pulse import first_line
from ramet.srt.utils.net import choose_interface

ROOT = 0  # the rank that sends
POLL_S = 0.0001
_nccl_options_lock = threading.Lock()


def connect(host: str, port: int, timeout_s: float, size: int | None = None) -> dist.TCPStore:
    """The store that another process holds.

    Args:
        size: of the group, where the holder counts who comes, as torch's own stores do unless told otherwise.

    Raises:
        OSError: if it can't be reached in time.
    """
    try:
        timeout = datetime.timedelta(seconds=timeout_s)
        return dist.TCPStore(host, port, size, is_master=False, wait_for_workers=size is not None, timeout=timeout)
    except (dist.DistError, RuntimeError) as error:
        raise OSError(f"{host}:{port} can't be reached: {first_line(error)}") from None


def torch_keys(store: dist.Store, name: str, device_type: str) -> dist.Store:
    """The part of a store in which a group of torch's, made beside the default one by name, has its keys."""
    prefix = dist.PrefixStore(f"{name}/", dist.PrefixStore(name, store))
    return dist.PrefixStore(f"{device_type}/", prefix)


class _Group(Protocol):
    """What is used of torch's groups; its stubs don't have it."""

    def broadcast(self, tensors: list[torch.Tensor], options: dist.BroadcastOptions, /) -> dist.Work: ...
    def allreduce(self, tensors: list[torch.Tensor], /) -> dist.Work: ...
    def barrier(self) -> dist.Work: ...
    def shutdown(self) -> None: ...
    def abort(self) -> None: ...


class BroadcastGroup:
    """One member. Every operation ends within the time limit, well or with an OSError."""

    def __init__(
        self, store: dist.Store, rank: int, size: int, device: torch.device, address: str, timeout_s: float
    ) -> None:
        """Meet the others.

        Args:
            store: with the keys of this group alone.
            device: of the tensors; the backend is gloo on the CPU and NCCL on CUDA.
            address: of this node, where gloo or NCCL listens for the others.
            timeout_s: for meeting, and for each operation.

        Raises:
            OSError: if one does not come in time.
        """
        self.timeout_s = timeout_s
        self.check: Callable[[], None] = lambda: None  # called while NCCL is waited for; an OSError ends that
        self._device = device
        timeout = datetime.timedelta(seconds=timeout_s)
        self._group: _Group | None  # None when it is closed, so that its sockets and threads go
        try:
            if device.type == "cuda":
                choose_interface(address)  # NCCL takes any other where the first group of a process is this one
                self._group = _make_nccl(store, rank, size, timeout)
            else:
                self._group = _make_gloo(store, rank, size, address, timeout)
        except (dist.DistError, RuntimeError) as error:
            raise OSError(f"the other side has not come within {timeout_s:g} s: {first_line(error)}") from None

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Send a contiguous tensor, or fill it with what the sender sends.

        Raises:
            OSError: if the other side has gone, or does nothing for too long.
        """
        options = dist.BroadcastOptions()
        options.rootRank = ROOT
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
                    self.check()
                    time.sleep(POLL_S)
                work.wait()  # has ended: this only makes the current stream know
                torch.cuda.current_stream().synchronize()
        except (dist.DistError, RuntimeError) as error:
            raise OSError(f"the other side has gone: {first_line(error)}") from None

    def close(self, failed: bool = False) -> None:
        """Part from the other side. May be called again.

        Args:
            failed: an operation may still be under way: it is broken off.
        """
        group, self._group = self._group, None
        if group is not None and self._device.type == "cuda":
            group.abort() if failed else group.shutdown()


def _make_gloo(store: dist.Store, rank: int, size: int, address: str, timeout: datetime.timedelta) -> _Group:
    kind: Any = dist.ProcessGroupGloo
    options = kind._Options()
    options._devices = [kind.create_device(hostname=address)]
    options._timeout = timeout
    return kind(store, rank, size, options)


def _make_nccl(store: dist.Store, rank: int, size: int, timeout: datetime.timedelta) -> _Group:
    kind: Any = dist.ProcessGroupNCCL
    options = kind.Options()
    options._timeout = timeout
    # By default torch ends the whole process when a peer is lost. Here the peer is of another instance: its end is
    # an error of one transfer, which `BroadcastGroup` finds by its own deadlines.
    with _nccl_options_lock, _environment(TORCH_NCCL_ASYNC_ERROR_HANDLING="0", TORCH_NCCL_ENABLE_MONITORING="0"):
        return kind(store, rank, size, options)


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
