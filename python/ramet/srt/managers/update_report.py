"""Owns what is known of weights that serve or are staged, and of how they came: data of the main process's side."""

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from ramet.srt.observability.traces import trace_work
from ramet.srt.weights.update_messages import WeightSource, WeightStepOutput

logger = logging.getLogger(__name__)

UpdateMode = Literal["staged", "staged_in_host_memory", "in_place"]


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
    mode: UpdateMode = "staged"

    @property
    def trace_attributes(self) -> dict[str, str | int | float]:
        """What a trace says of it."""
        return {
            "ramet.weights.version": self.version,
            "ramet.weights.origin": self.origin,
            "ramet.weights.source": self.source,
            "ramet.weights.bytes": self.num_bytes,
            "ramet.weights.pause_seconds": self.pause_s,
        }

    @property
    def message(self) -> str:
        done = {"staged": "staged", "staged_in_host_memory": "staged in host memory", "in_place": "written"}[self.mode]
        way = f"{self.num_bytes} bytes {done} from {self.source} in {self.stage_s:.3f} s" if self.source else done
        words = f"the weights are those of {self.origin} ({self.version}): {way}, a pause of {self.pause_s:.4f} s"
        return f"{words}; {self.trouble}" if self.trouble else words


def note_update(report: UpdateReport) -> None:
    """Other weights serve now: say so in the log and in traces."""
    logger.info("%s", report.message)
    trace_work("update weights", report.stage_s + report.pause_s, report.trace_attributes)


@dataclass(frozen=True)
class Staged:
    """What has come for content, on all ranks."""

    source: str = ""
    num_bytes: int = 0
    seconds: float = 0.0
    transfer_s: float = 0.0  # 0 where that is not taken apart
    in_host_memory: bool = False
    lacks: str = ""  # names of tensors that have not come, if the weights are to be whole

    @classmethod
    def of(cls, replies: list[WeightStepOutput]) -> "Staged":
        """By what all replicas say of one step."""
        return cls(
            _joined(reply.source for reply in replies),
            sum(reply.num_bytes for reply in replies),
            max(reply.seconds for reply in replies),
            max(reply.transfer_s for reply in replies),
            any(reply.in_host_memory for reply in replies),
            next((reply.lacks for reply in replies if reply.lacks), ""),
        )

    def __add__(self, other: "Staged") -> "Staged":
        source = _joined((self.source, other.source))
        seconds, transfer_s = self.seconds + other.seconds, self.transfer_s + other.transfer_s
        in_host_memory = self.in_host_memory or other.in_host_memory
        return Staged(source, self.num_bytes + other.num_bytes, seconds, transfer_s, in_host_memory, other.lacks)

    @property
    def mode(self) -> UpdateMode:
        """Where it waits for its switch."""
        return "staged_in_host_memory" if self.in_host_memory else "staged"


def _joined(sources: Iterable[str]) -> str:
    return "+".join(sorted({part for source in sources for part in source.split("+") if part}))
