"""Owns the transport processes of one round of receiving: one for each family of addresses that seeds have."""

import threading

from ramet.srt.model_loader.transport.mooncake_engine import choose_protocol
from ramet.srt.model_loader.transport.transport_process import TransportProcess, numeric_address
from ramet.srt.utils.net import format_address, is_ipv6, reachable_host
from ramet.srt.weights.errors import WeightTransferError


class Receivers:
    """What reads from seeds. Nobody has to reach it over TCP, so it listens on loopback alone then."""

    def __init__(self, host: str, rank: int) -> None:
        """
        Args:
            host: address that the instance is bound to: seeds answer to it where they are read by RDMA.
        """
        self._host = host
        self._rank = rank
        self._lock = threading.Lock()
        self._processes: dict[bool, TransportProcess] = {}  # whether for IPv6

    def get(self, session_id: str) -> TransportProcess:
        """The process that reads from a seed.

        Raises:
            WeightTransferError: if Mooncake is not installed or does not start.
        """
        if session_id.endswith(":0"):
            reason = (
                "the seed runs no transfer engine; --remote-instance-weight-loader-start-seed-via-transfer-engine "
                "starts one there, if Mooncake is installed"
            )
            raise WeightTransferError("transfer", self._rank, session_id, reason)
        wants_ipv6 = is_ipv6(_host_of(session_id))
        with self._lock:
            if wants_ipv6 not in self._processes:
                self._processes[wants_ipv6] = self._start(wants_ipv6)
            return self._processes[wants_ipv6]

    def close(self) -> None:
        """End the processes: nothing is written any more afterwards."""
        with self._lock:
            for process in self._processes.values():
                process.kill()
            self._processes.clear()

    def _start(self, wants_ipv6: bool) -> TransportProcess:
        if choose_protocol() == "tcp":
            loopback = "::1" if wants_ipv6 else "127.0.0.1"
            return TransportProcess(loopback, loopback, self._rank)
        name = reachable_host(self._host)
        try:
            return TransportProcess(name, numeric_address(name), self._rank)
        except OSError as error:
            raise WeightTransferError("start", self._rank, name, f"no address of this host: {error}") from error


def _host_of(session_id: str) -> str:
    return session_id.rpartition(":")[0].strip("[]")


def normal_session_id(session_id: str) -> str:
    """With brackets around an IPv6 address, which older seeds leave out and Mooncake can't do without."""
    host, _, port = session_id.rpartition(":")
    return format_address(host.strip("[]"), port)
