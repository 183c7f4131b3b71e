"""Owns how the ranks of an instance find each other: a key-value store. Whether they still move: node_pulse.py."""

import datetime
import logging
import os
import socket
import time
from collections.abc import Callable, Sequence

import torch.distributed as dist

from ramet.srt.distributed.node_pulse import STORE_TIMEOUT_S, NodePulse, first_line, let_loss_be_named
from ramet.srt.distributed.words import NodeVoice
from ramet.srt.utils.net import listen_on, split_address

logger = logging.getLogger(__name__)

POLL_S = 0.02
CONNECT_PERIOD_S = 0.1
SAY_AFTER_S = 3.0  # of waiting for others at the start
CONNECT_TIMEOUT_S = 2.0
END_TIMEOUT_S = 3.0
NAMED_AFTER_S = 1.0  # a main process sees the end of a rank within this time


class Rendezvous:
    """The store of one instance, where ranks leave addresses and news for each other.

    Args:
        address: "file:PATH" for ranks of one node, or "host:port" where world rank 0 listens.
    """

    def __init__(self, address: str, world_rank: int, world_size: int, nnodes: int, timeout_s: float):
        self.world_rank = world_rank
        self.world_size = world_size
        self.nnodes = nnodes
        self.timeout_s = timeout_s
        self._address = address
        self.store = self._open(timeout_s, is_master=world_rank == 0)
        self._pulse: NodePulse | None = None
        self._has_joined = False

    def _open(self, timeout_s: float, is_master: bool = False) -> dist.Store:
        """A connection to the store.

        Raises:
            ValueError: if world rank 0 can't listen there, or can't be reached in time.
        """
        if self._address.startswith("file:"):
            return dist.FileStore(self._address.removeprefix("file:"), self.world_size)
        host, port = split_address(self._address, "--dist-init-addr")
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # below it are only complaints about missing DNS names
        if not is_master:
            self._wait_for_listener(host, port, timeout_s)
        try:
            return dist.TCPStore(
                host,
                port,
                world_size=None,
                is_master=is_master,
                timeout=datetime.timedelta(seconds=timeout_s),
                wait_for_workers=False,
                master_listen_fd=self._listen(host, port).detach() if is_master else None,
            )
        except (dist.DistError, RuntimeError) as error:
            what = "listen on" if is_master else "use the store at"
            raise ValueError(
                f"rank {self.world_rank} can't {what} {self._address} (--dist-init-addr): {first_line(error)}"
            ) from None

    def _listen(self, host: str, port: int) -> socket.socket:
        """A socket at that address alone: torch's own would listen on every one.

        Raises:
            ValueError: if this node has no such address, or the port is in use.
        """
        try:
            return listen_on(host, port)
        except OSError as error:
            raise ValueError(
                f"rank {self.world_rank} can't listen on {self._address} (--dist-init-addr): {error.strerror or error}"
            ) from None

    def _wait_for_listener(self, host: str, port: int, timeout_s: float) -> None:
        """Wait until world rank 0 listens. Torch's store can wait too, but fills the log with stack traces.

        Raises:
            ValueError: if it does not within `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        news = _NewsOfWaiting(timeout_s)
        while True:
            try:
                remaining_s = deadline - time.monotonic()
                socket.create_connection((host, port), timeout=max(0.1, min(CONNECT_TIMEOUT_S, remaining_s))).close()
                return
            except OSError as error:
                if time.monotonic() > deadline:
                    raise ValueError(
                        f"rank {self.world_rank} could not reach node 0 at {self._address} (--dist-init-addr) within "
                        f"{timeout_s:g} s (--dist-timeout): {error}"
                    ) from None
                news.tell(f"node 0 at {self._address}")
                time.sleep(CONNECT_PERIOD_S)

    def put(self, key: str, value: str) -> None:
        self.store.set(key, value)

    def get(self, key: str) -> str:
        """The value of a key that is known to be there."""
        return self.store.get(key).decode()

    def wait_for(self, key: str) -> str:
        """The value of a key that is about to be put.

        Raises:
            ValueError: if it is not in time.
        """
        deadline = time.monotonic() + self.timeout_s
        while not self.store.check([key]):
            if time.monotonic() > deadline:
                raise ValueError(f"{key} was not said within {self.timeout_s:g} s (--dist-timeout)")
            time.sleep(POLL_S)
        return self.get(key)

    def announce(self, key: str, value: str) -> None:
        """As `put`, from any thread: over a connection of its own."""
        self._open(STORE_TIMEOUT_S).set(key, value)

    def await_announcement(self, key: str, timeout_s: float) -> str | None:
        """The value of a key, from any thread; None if nobody has put one within `timeout_s`."""
        store = self._open(STORE_TIMEOUT_S)
        deadline = time.monotonic() + timeout_s
        while not store.check([key]):
            if time.monotonic() > deadline:
                return None
            time.sleep(POLL_S)
        return store.get(key).decode()

    def wait_all(self, key: str, ranks: Sequence[int], timeout_s: float | None = None) -> list[str]:
        """The values that `ranks` have put under `key`.

        Args:
            timeout_s: None waits for as long as all nodes have a pulse.

        Raises:
            ValueError: if some did not in time; the message names the ranks and their nodes.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        missing = list(ranks)
        news = None if timeout_s is None or self.world_rank > 0 else _NewsOfWaiting(timeout_s)
        while missing := [rank for rank in missing if not self.store.check([f"{key}/{rank}"])]:
            nodes = sorted({rank * self.nnodes // self.world_size for rank in missing})
            who = f"rank {', '.join(map(str, missing))} of node {', '.join(map(str, nodes))}"
            if deadline is not None and time.monotonic() > deadline:
                raise ValueError(f"{who} did not come within {timeout_s:g} s (--dist-timeout)")
            if news is not None:
                news.tell(who)
            time.sleep(POLL_S)
        return [self.get(f"{key}/{rank}") for rank in ranks]

    def join(self) -> None:
        """Wait until every rank of every node is here.

        Raises:
            ValueError: if one does not come in time.
        """
        self.put(f"joined/{self.world_rank}", "")
        self.wait_all("joined", range(self.world_size), self.timeout_s)
        self._has_joined = True

    def start_pulse(
        self,
        title: str,
        limit_s: float,
        voice: NodeVoice,
        on_loss: Callable[[str], None],
        on_end: Callable[[], None],
    ) -> None:
        """Tell the other nodes that this one lives, and watch them; needed once per node, where there are several.

        Args: as of NodePulse.
        """
        node = self.world_rank * self.nnodes // self.world_size
        self._pulse = NodePulse(self._open, node, self.nnodes, title, limit_s, voice, on_loss, on_end)
        self._pulse.start()

    def let_loss_be_named(self, error: Exception) -> bool:
        """Whether `error` says that another rank can't be reached any more. Then wait until that is named, for a while.

        A broken connection is noticed at once, but the libraries' errors name nobody. On one node the main process says
        which rank has ended; the loss of a node is said by the pulse, which ends the process.
        """
        is_gloo_error = type(error) is RuntimeError and "gloo" in str(error)
        if not self._has_joined or not (is_gloo_error or isinstance(error, dist.DistError)):
            return False
        logger.debug("an operation between ranks broke off", exc_info=error)
        if self.nnodes == 1:
            time.sleep(NAMED_AFTER_S)
        else:
            let_loss_be_named(self.put)
        return True

    def end(self) -> None:
        """Say to the other nodes that the instance ends in good order, and give them time to hear it.

        The store ends with this process: a node that has not heard would take that for a loss.
        """
        if self.nnodes == 1:
            return
        self.put("ended", "")
        deadline = time.monotonic() + END_TIMEOUT_S
        others = [f"left/{node}" for node in range(1, self.nnodes)]
        while not self.store.check(others) and time.monotonic() < deadline:
            time.sleep(POLL_S)

    def close(self) -> None:
        if self._pulse is not None:
            self._pulse.close()


class _NewsOfWaiting:
    """One line in the log about whom this process waits for, once it has taken a while."""

    def __init__(self, timeout_s: float):
        self._timeout_s = timeout_s
        self._when: float | None = time.monotonic() + SAY_AFTER_S

    def tell(self, whom: str) -> None:
        if self._when is not None and time.monotonic() > self._when:
            logger.info("waiting up to %g s (--dist-timeout) for %s", self._timeout_s, whom)
            self._when = None
