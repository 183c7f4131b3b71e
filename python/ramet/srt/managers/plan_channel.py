"""Owns how a replica's leader sends batch plans to its other ranks, and how a sampling one sends results back."""

import os

import msgspec
import zmq

from ramet.srt.batch.batch_plan import BatchPlan, BatchResult
from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.distributed.rendezvous import Rendezvous
from ramet.srt.managers.io_struct import (
    FinishLoraReq,
    LoadLoraReqInput,
    StartProfileReqInput,
    StopProfileReqInput,
    UnloadLoraReqInput,
)
from ramet.srt.utils.net import format_address, is_ipv6
from ramet.srt.weights.inspection_messages import WeightInspection
from ramet.srt.weights.memory_messages import MemoryStep
from ramet.srt.weights.update_messages import WeightStep

SEND_TIMEOUT_MS = 30_000
PLANS_KEY = "plans"
RESULTS_KEY = "results"

# What comes between two plans belongs between these passes, on every rank.
PlanMessage = (
    BatchPlan
    | StartProfileReqInput
    | StopProfileReqInput
    | LoadLoraReqInput
    | FinishLoraReq
    | UnloadLoraReqInput
    | WeightStep
    | MemoryStep
    | WeightInspection
)
_plan_decoder = msgspec.msgpack.Decoder(PlanMessage)
_result_decoder = msgspec.msgpack.Decoder(BatchResult)
_encoder = msgspec.msgpack.Encoder()


class PlanSender:
    """The leader's side. It reads results from the start; `connect` once every rank has joined."""

    def __init__(self, rendezvous: Rendezvous, address: str):
        """
        Args:
            address: see bind_reader.
        """
        self._rendezvous = rendezvous
        self._context = zmq.Context()
        self._results = bind_reader(self._context, rendezvous, RESULTS_KEY, address)
        self._followers: list[zmq.Socket[bytes]] = []

    def connect(self, parallel: ParallelConfig) -> None:
        """Connect to the followers, which have joined and so have said where they read."""
        for rank in parallel.replica_ranks:
            if rank != parallel.world_rank:
                self._followers.append(connect_writer(self._context, self._rendezvous.get(f"{PLANS_KEY}/{rank}")))

    def send(self, message: PlanMessage) -> None:
        """Hand the message to every follower."""
        data = _encoder.encode(message)
        for follower in self._followers:
            follower.send(data)

    def receive(self, timeout_s: float) -> BatchResult | None:
        """The next result, in the order of the plans; None if there is none within `timeout_s`.

        Raises:
            msgspec.DecodeError: if something else has come.
        """
        if not self._results.poll(int(timeout_s * 1000)):
            return None
        return _result_decoder.decode(self._results.recv())

    def close(self) -> None:
        self._context.destroy(linger=0)


class PlanReceiver:
    """A follower's side."""

    def __init__(self, rendezvous: Rendezvous, address: str):
        """
        Args:
            address: see bind_reader.
        """
        self._rendezvous = rendezvous
        self._context = zmq.Context()
        self._plans = bind_reader(self._context, rendezvous, PLANS_KEY, address)

    def receive(self, timeout_s: float) -> PlanMessage | None:
        """The next message; None if there is none within `timeout_s`.

        Raises:
            msgspec.DecodeError: if something else has come.
        """
        if not self._plans.poll(int(timeout_s * 1000)):
            return None
        return _plan_decoder.decode(self._plans.recv())

    def open_results(self, parallel: ParallelConfig) -> "ResultSender":
        """The way back to the leader, for the rank that samples; once every rank has joined."""
        return ResultSender(
            connect_writer(self._context, self._rendezvous.get(f"{RESULTS_KEY}/{parallel.leader_rank}"))
        )

    def close(self) -> None:
        self._context.destroy(linger=0)


class ResultSender:
    """Tells the leader what passes gave. It is closed with the PlanReceiver that opened it."""

    def __init__(self, socket: "zmq.Socket[bytes]"):
        self._socket = socket

    def send(self, result: BatchResult) -> None:
        """Send the result of a plan."""
        self._socket.send(_encoder.encode(result))


def bind_reader(
    context: "zmq.Context[zmq.Socket[bytes]]", rendezvous: Rendezvous, key: str, address: str
) -> "zmq.Socket[bytes]":
    """A PULL socket at `address`, announced under `key` of this rank.

    Args:
        address: a folder for Unix sockets, or the IP address of this node.
    """
    socket = context.socket(zmq.PULL)
    socket.setsockopt(zmq.RCVHWM, 0)
    if address.startswith(os.sep):
        socket.bind(f"ipc://{address}/{key}-{rendezvous.world_rank}")
    else:
        socket.setsockopt(zmq.IPV6, is_ipv6(address))
        socket.bind(f"tcp://{format_address(address, '*')}")
    rendezvous.put(f"{key}/{rendezvous.world_rank}", socket.getsockopt_string(zmq.LAST_ENDPOINT))
    return socket


def connect_writer(context: "zmq.Context[zmq.Socket[bytes]]", address: str) -> "zmq.Socket[bytes]":
    """A PUSH socket to `address`. Sending fails after half a minute without a reader."""
    socket = context.socket(zmq.PUSH)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.SNDTIMEO, SEND_TIMEOUT_MS)
    socket.setsockopt(zmq.LINGER, 0)  # a start that fails must not wait for whoever never reads
    socket.setsockopt(zmq.IPV6, 1)
    socket.connect(address)
    return socket
