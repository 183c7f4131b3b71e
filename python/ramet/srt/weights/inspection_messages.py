"""Owns what is said inside an instance when somebody looks at its weights: at numbers of one, at checksums of all."""

from typing import Literal

import msgspec

from ramet.srt.weights.boxes import Region

CheckAction = Literal["checksum", "snapshot", "compare"]


class ReadWeightReq(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Read the first rows of a tensor. A replica's leader hands it on to its other ranks, between the same passes."""

    request_id: str
    name: str  # of a checkpoint's tensor, or of one in the arena
    num_rows: int  # at most


class CheckWeightsReq(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Hash every tensor anew from memory. Handed on in the same way."""

    request_id: str
    action: CheckAction  # tell the checksums; keep them as well; or tell which differ from those that were kept


class WeightPart(msgspec.Struct, frozen=True, array_like=True):
    """What a rank has of the first rows of a checkpoint's tensor."""

    place: int  # of the tensor among those that are asked for together
    region: Region  # of the tensor
    values: bytes  # float32, row-major


class RankReading(msgspec.Struct, frozen=True, kw_only=True):
    """A rank's answer to ReadWeightReq."""

    failure: str = ""
    parts: list[WeightPart] = []


class RankChecksums(msgspec.Struct, frozen=True, kw_only=True):
    """A rank's answer to CheckWeightsReq."""

    rank: int  # in the instance
    checksums: dict[str, str]  # 16 hex digits by the name of a tensor in its arena
    different: list[str] = []  # names, for "compare"
    failure: str = ""


class ReadWeightOutput(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A replica's leader to the main process: a tensor over all its ranks, or why not."""

    request_id: str
    failure: str = ""
    shape: tuple[int, ...] = ()
    values: bytes = b""  # float32, row-major


class CheckWeightsOutput(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The same of checksums."""

    request_id: str
    ranks: list[RankChecksums]


WeightInspection = ReadWeightReq | CheckWeightsReq
WeightInspectionOutput = ReadWeightOutput | CheckWeightsOutput
