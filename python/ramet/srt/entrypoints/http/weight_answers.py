"""Owns the description of successful answers about weights and their versions: see answers.py."""

from typing import Literal

from ramet.srt.entrypoints.http.answers import Answer, Done
from ramet.srt.managers.update_report import UpdateMode


class WeightsChanged(Answer):
    """What changing the weights has done."""

    success: Literal[True]
    message: str
    num_paused_requests: int  # that ran or waited at the switch
    weight_version: str  # that serves now
    mode: UpdateMode  # beside what served before, in memory of the host, or in its place
    source: str  # as in load reports; "" for what was staged before
    num_bytes: int  # that came, on all ranks
    stage_seconds: float  # serving went on meanwhile
    transfer_seconds: float  # of these, those in which bytes moved; 0 where that is not taken apart
    pause_seconds: float  # in which no pass was computed


class TensorsTaken(Answer):
    """Tensors have come, into a session; without one it is what other updates answer."""

    success: Literal[True]
    message: str
    source: str
    num_bytes: int  # on all ranks
    stage_seconds: float


class WeightSessionOpened(Answer):
    """Tensors may come."""

    success: Literal[True]
    message: str


class WeightVersion(Answer):
    """Weights that the instance has."""

    weight_version: str
    origin: str  # folder, hub id or address
    is_serving: bool
    since: float  # unix seconds, from which it has served the last time


class WeightVersions(Answer):
    """All of them."""

    versions: list[WeightVersion]  # the one that serves, and those to which there is a way back, the newest first
    keep_weight_versions: int


class TransferOutcome(Answer):
    """What vLLM's routes for weights answer."""

    message: str


class WorldSize(Answer):
    """How many ranks an instance has."""

    world_size: int


class RankPlace(Answer):
    """A rank's parallel coordinates."""

    tp_rank: int
    tp_size: int
    dp_rank: int
    dp_size: int
    pp_rank: int
    pp_size: int
    rank: int
    size: int


class RankChecksums(Answer):
    """What one rank has."""

    checksums: dict[str, str]  # 16 hex digits of each tensor
    per_gpu_checksum: str  # SHA-256 over them
    parallelism_info: RankPlace


class WeightsChecked(Done):
    """What has been done; and after `checksum`, what all ranks have."""

    ranks: list[RankChecksums] | None = None
    per_engine_checksum: str | None = None  # SHA-256 over theirs


class VersionOutcome(Done):
    """By which version's name the weights go now."""

    new_version: str


class WeightInfo(Answer):
    """Which weights are served."""

    weight_version: str
