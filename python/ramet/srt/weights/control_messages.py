"""Owns the messages on a rank's control socket: what only the process that holds the weights can do or tell."""

import msgspec

from ramet.srt.weights.boxes import WeightRegion


class WeightChecksumsReq(msgspec.Struct, kw_only=True, tag=True):
    """Main process to a rank: the checksums of slices of checkpoint tensors that are in its weights."""

    regions: list[WeightRegion]


class WeightChecksumsOutput(msgspec.Struct, kw_only=True, tag=True):
    """A rank to the main process."""

    algorithm: str
    checksums: list[str]  # in the order of the regions


class InitSendGroupReq(msgspec.Struct, kw_only=True, tag=True):
    """Main process to a rank: meet a client's rank in a group of two.

    The name is the client's if it is of upstream's kind, which gets every parameter; otherwise the rank makes one.
    """

    port: int = 0  # where to listen; 0 takes a free one
    group_name: str = ""
    backend: str = ""  # "nccl" or "gloo"; empty: the one of the rank's device
    broadcasts: list[list[tuple[int, int, int, int]]] = []  # rows of the arena that each broadcast carries
    layout: str = ""  # digest of the layout that the rows are of
    timeout_s: float = 60.0  # for each step
    warm_up: bool = False  # send one byte before the broadcasts


class InitSendGroupOutput(msgspec.Struct, kw_only=True, tag=True):
    """A rank to the main process: where the client finds it."""

    transfer_id: str
    master_address: str
    port: int
    warm_up: bool = False  # whether one byte comes before the broadcasts


class SendWeightsReq(msgspec.Struct, kw_only=True, tag=True):
    """Main process to a rank: send what was agreed on; answered when it has been sent."""

    transfer_id: str


class SendWeightsOutput(msgspec.Struct, kw_only=True, tag=True):
    """A rank to the main process."""

    num_bytes: int
    seconds: float


class WeightControlError(msgspec.Struct, kw_only=True, tag=True):
    """A rank to the main process: why it does not do what it was asked to."""

    message: str
    is_busy: bool = False  # it could later


class InstanceReady(msgspec.Struct, kw_only=True, tag=True):
    """Main process to every rank that offers its weights: the instance is healthy, others may come."""


class InstanceStopping(msgspec.Struct, kw_only=True, tag=True):
    """Main process to every rank that offers its weights: the instance is about to end, nobody shall come any more."""


class WeightsRenamed(msgspec.Struct, kw_only=True, tag=True):
    """Main process to every rank that offers its weights: the same bytes go by another version's name from now on."""

    version: str


class InstanceStateOutput(msgspec.Struct, kw_only=True, tag=True):
    """A rank to the main process: it has noted the news of the instance, and told others if it could."""


class DigestTableReq(msgspec.Struct, kw_only=True, tag=True):
    """Main process to a rank: a part of the table of hashes behind the digest of its weights."""

    first: int


class DigestTableOutput(msgspec.Struct, kw_only=True, tag=True):
    """A rank to the main process."""

    num_tensors: int
    tensors: bytes


WeightRequest = (
    WeightChecksumsReq
    | DigestTableReq
    | InitSendGroupReq
    | SendWeightsReq
    | InstanceReady
    | InstanceStopping
    | WeightsRenamed
)
WeightReply = (
    WeightChecksumsOutput
    | DigestTableOutput
    | InitSendGroupOutput
    | SendWeightsOutput
    | InstanceStateOutput
    | WeightControlError
)
