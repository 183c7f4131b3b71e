"""Owns the scheduler's sockets: requests in, outputs and replies out."""

import zmq

from ramet.srt.managers.io_struct import BatchTokenIDOutput, Message, decode, encode
from ramet.srt.managers.port_args import PortArgs

SEND_TIMEOUT_MS = 30_000
LINGER_MS = 1000


class SchedulerChannel:
    """PULL from the tokenizer manager; PUSH to the detokenizer (outputs) and the tokenizer manager (replies)."""

    def __init__(self, address: str):
        """
        Args:
            address: where to listen for requests, a pyzmq address; "tcp://IP:*" takes a free port.
        """
        self._context = zmq.Context()
        self._requests = self._context.socket(zmq.PULL)
        self._requests.setsockopt(zmq.RCVHWM, 0)
        self._requests.setsockopt(zmq.IPV6, "[" in address)
        self._requests.bind(address)
        self.address: str = self._requests.getsockopt_string(zmq.LAST_ENDPOINT)

    def connect(self, port_args: PortArgs) -> None:
        """Connect to the detokenizer and the tokenizer manager, on node 0."""
        self._outputs = self._push(port_args.detokenizer_ipc_name)
        self._replies = self._push(port_args.tokenizer_ipc_name)

    def _push(self, address: str) -> zmq.Socket:
        socket = self._context.socket(zmq.PUSH)
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.SNDTIMEO, SEND_TIMEOUT_MS)
        socket.setsockopt(zmq.LINGER, LINGER_MS)
        socket.setsockopt(zmq.IPV6, 1)
        socket.connect(address)
        return socket

    def receive(self, timeout_s: float) -> list[Message]:
        """Every message that is there, after waiting up to `timeout_s` seconds for the first."""
        messages: list[Message] = []
        if timeout_s and not self._requests.poll(int(timeout_s * 1000)):
            return messages
        while True:
            try:
                messages.append(decode(self._requests.recv(zmq.NOBLOCK)))
            except zmq.Again:
                return messages

    def send(self, output: BatchTokenIDOutput) -> None:
        self._outputs.send(encode(output))

    def reply(self, message: Message) -> None:
        self._replies.send(encode(message))

    def close(self) -> None:
        """Close the sockets; what is queued is sent for up to a second."""
        self._context.destroy(linger=LINGER_MS)
