"""Owns what is known of weights that serve or are staged, and of how they came: data of the main process's side."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from ramet.srt.weights.update_messages import WeightSource, WeightStepOutput


@dataclass(frozen=True)
class Content:
    """What the ranks have under a number."""

    number: int
    version: str
    origin: str
    model_path: str | None
    source: WeightSource | None = None  # where it can be had again, of files and instances
    since: float = field(default_factory=time.time)  # unix seconds
    is_made_up: bool = False  # and must not serve


@dataclass(frozen=True)
class UpdateReport:
    """What came of an update."""

    version: str
    origin: str
    pause_s: float
    num_reqs: int  # that ran or waited at the switch
    source: str = ""
    num_bytes: int = 0
    stage_s: float = 0.0
    transfer_s: float = 0.0
    trouble: str = ""  # why others can't take the weights now

    @property
    def message(self) -> str:
        way = f"{self.num_bytes} bytes staged from {self.source} in {self.stage_s:.3f} s" if self.source else "staged"
        words = f"the weights are those of {self.origin} ({self.version}): {way}, a pause of {self.pause_s:.4f} s"
        return f"{words}; {self.trouble}" if self.trouble else words


@dataclass(frozen=True)
class Staged:
    """What has come for content, on all ranks."""

    source: str = ""
    num_bytes: int = 0
    seconds: float = 0.0
    transfer_s: float = 0.0  # 0 where that is not taken apart

    @classmethod
    def of(cls, replies: list[WeightStepOutput]) -> "Staged":
        """By what all replicas say of one step."""
        return cls(
            _joined(reply.source for reply in replies),
            sum(reply.num_bytes for reply in replies),
            max(reply.seconds for reply in replies),
            max(reply.transfer_s for reply in replies),
        )

    def __add__(self, other: "Staged") -> "Staged":
        source = _joined((self.source, other.source))
        seconds, transfer_s = self.seconds + other.seconds, self.transfer_s + other.transfer_s
        return Staged(source, self.num_bytes + other.num_bytes, seconds, transfer_s)


def _joined(sources: Iterable[str]) -> str:
    return "+".join(sorted({part for source in sources for part in source.split("+") if part}))
