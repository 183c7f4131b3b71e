"""Owns which data-parallel replica gets which request. It lives in the tokenizer manager's process: no extra hop."""

from collections.abc import Callable, Sequence

from ramet.srt.managers.io_struct import AbortReq, Message, TokenizedGenerateReqInput

Sender = Callable[[Message], None]


class DataParallelController:
    """Spreads requests over the replicas' schedulers, one of which is all there is without data parallelism.

    Args:
        method: "round_robin", or "total_requests": the replica with the fewest unfinished requests.
    """

    def __init__(self, method: str):
        self._method = method
        self._senders: Sequence[Sender] = []
        self._replica_of: dict[str, int] = {}
        self._num_running: list[int] = []
        self._next = 0

    @property
    def num_replicas(self) -> int:
        return len(self._senders)

    def connect(self, senders: Sequence[Sender]) -> None:
        """Begin to use the replicas' schedulers, in the order of their data-parallel ranks."""
        self._senders = senders
        self._num_running = [0] * len(senders)

    def dispatch(self, request: TokenizedGenerateReqInput) -> None:
        """Send a request to a replica and remember to which."""
        replica = self._choose()
        self._replica_of[request.rid] = replica
        self._num_running[replica] += 1
        self._senders[replica](request)

    def abort(self, rid: str) -> None:
        """End a request where it runs."""
        replica = self._replica_of.get(rid)
        if replica is not None:
            self._senders[replica](AbortReq(rid=rid))

    def forget(self, rid: str) -> None:
        """A request has ended."""
        replica = self._replica_of.pop(rid, None)
        if replica is not None:
            self._num_running[replica] -= 1

    def send(self, replica: int, message: Message) -> None:
        self._senders[replica](message)

    def broadcast(self, message: Message) -> None:
        """Send a message to every replica."""
        for sender in self._senders:
            sender(message)

    def _choose(self) -> int:
        turn = self._next
        self._next = (turn + 1) % len(self._senders)
        if self._method == "round_robin":
            return turn
        # Of those with the fewest, the one whose turn comes first.
        order = [(turn + step) % len(self._senders) for step in range(len(self._senders))]
        return min(order, key=lambda replica: self._num_running[replica])
