"""Owns the doors of an arena for others: its memory for this host and for other ones, and the talk with who takes.

They can be opened before the arena is full: pieces that were checked are given on while the others still come.
"""

from contextlib import ExitStack

from ramet.srt.model_loader.arena.base import WeightArena
from ramet.srt.model_loader.transport.local_share import LocalShareServer
from ramet.srt.model_loader.transport.memory_offer import MemoryOffer, OfferFromHere
from ramet.srt.model_loader.transport.peer_hub import PeerHub
from ramet.srt.utils.net import host_identity
from ramet.srt.weights.peer_messages import PeerOffer


class Doors:
    """What is open until `close`."""

    def __init__(self, arena: WeightArena, memory: MemoryOffer | OfferFromHere | None, hub: PeerHub | None) -> None:
        """
        Args:
            memory: for other hosts; becomes these doors', as `hub` does.

        Raises:
            OSError: if a socket can't be made.
        """
        self.memory = memory
        self.hub = hub
        self.address = arena.address if memory is None else memory.address
        with ExitStack() as undo:
            if hub is not None:
                undo.callback(hub.close)
            if memory is not None:
                undo.callback(memory.close)
            self.share = LocalShareServer(arena)
            undo.callback(self.share.close)
            self._resources = undo.pop_all()

    def as_peer(self, peer_id: str, http_port: int) -> PeerOffer:
        """What others that take the same weights need to take them from here."""
        assert self.hub is not None
        return PeerOffer(
            peer_id=peer_id,
            link=self.hub.link,
            http_port=http_port,
            host_identity=host_identity(),
            socket_name=self.share.name,
            session_id="" if self.memory is None else self.memory.session_id,
            arena_address=self.address,
        )

    def close(self) -> None:
        """Nobody comes in any more. Processes that have mapped the memory keep it."""
        self._resources.close()
