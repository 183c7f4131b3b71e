"""Owns what nodes of an instance say to each other: whose process doesn't move, who was told to end. No torch."""

from dataclasses import dataclass
from typing import Protocol

PULSE_PERIOD_S = 1.0  # between two beats of a node, with each of which it says its word


@dataclass(frozen=True)
class Word:
    """What is said about a process that does not move."""

    text: str
    is_final: bool = False  # the instance ends because of it; until then it may still move on

    def __str__(self) -> str:
        return ("!" if self.is_final else "?") + self.text

    @classmethod
    def parse(cls, text: str) -> "Word | None":
        """What `str` has made of a word; None of an empty text."""
        return cls(text[1:], text[0] == "!") if text else None


class NodeVoice(Protocol):
    """A node's side of what nodes say to each other about their processes. Any thread may call it."""

    def own_word(self) -> Word | None:
        """What the other nodes are to hear."""

    def hear(self, word: Word | None, /) -> None:
        """What another node says, or what its silence means; None once all move."""

    def is_told_to_end(self) -> bool:
        """Whether this node was told to end, and waits for node 0 to end the instance."""

    def hear_end(self, node: int, /) -> None:
        """Such a node, 1 or above, as node 0 hears of it."""
