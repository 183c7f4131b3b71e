"""Owns what a change of weights needs of others: the source, the instance's doors, and its life."""

from typing import Protocol

from ramet.srt.weights.update_messages import WeightSource


class Doors(Protocol):
    """What an instance is toward others while its weights change."""

    @property
    def gives_weights(self) -> bool:
        """Whether other instances may come for the weights."""

    def close_for_weights(self, *, asleep: bool = False) -> None:
        """Give the weights to nobody new: they change, or the instance sleeps."""

    def open_for_weights(self) -> None:
        """The ranks have registered what they have now: others may come."""


class Life(Protocol):
    """What a change of weights can do to an instance."""

    def end(self, line: str, /) -> None:
        """The instance can't go on."""


class FoundSource(Protocol):
    """Weights that somebody has."""

    @property
    def origin(self) -> str:
        """As people call it."""

    @property
    def source(self) -> WeightSource:
        """For the ranks."""

    @property
    def model_path(self) -> str | None:
        """Folder or hub id, of files."""

    @property
    def version(self) -> str | None:
        """The name that they have already, to be kept where nobody gives another; None: there is none."""

    def is_unchanged(self) -> bool:
        """Whether it still has the content that it had when it was found. For a thread.

        Raises:
            ValueError: if nobody can tell any more.
        """

    def end(self, *, has_it: bool) -> None:
        """The attempt to serve it has ended, well or not: what it kept from others is theirs."""
