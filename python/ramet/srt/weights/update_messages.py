"""Owns what is said inside an instance while its weights change: where from, and the steps of all its ranks."""

import msgspec

OTHER_TENSORS = "the ranks were not sent the same tensors, or have not found the same files"


class FileStamp(msgspec.Struct, frozen=True, array_like=True):
    """What tells that a file is still the one that was read."""

    name: str
    nbytes: int
    mtime_ns: int
    ctime_ns: int  # cannot be set back, as the time of a change can
    inode: int

    @property
    def everywhere(self) -> tuple[str, int]:
        """What is the same on every host that has the file."""
        return self.name, self.nbytes


class FilesSource(msgspec.Struct, frozen=True, kw_only=True, tag="files"):
    """Weights from a checkpoint, which must be the same one for all ranks, from its first byte to its last."""

    path: str  # folder or hub id
    revision: str | None = None
    digest: str | None = None  # that its content must have: 64 hex digits
    host_identity: str = ""  # of the host that has looked at the files
    files: list[FileStamp] = []


class InstanceSource(msgspec.Struct, frozen=True, kw_only=True, tag="instance"):
    """Weights from a running instance."""

    host: str
    port: int
    scheme: str = "http"
    digest: str | None = None
    is_listed: bool = False  # at a metadata server, by whoever may publish there: it must not earn a key


class TrainerRank(msgspec.Struct, frozen=True, array_like=True):
    """Where one rank of a trainer answers."""

    host: str
    port: int
    scheme: str = "http"


class TrainerSource(msgspec.Struct, frozen=True, kw_only=True, tag="trainer"):
    """Weights that the ranks of a trainer publish, each a part."""

    ranks: list[TrainerRank]
    version: str  # as they call it
    is_listed: bool = False  # see InstanceSource


class MadeUpSource(msgspec.Struct, frozen=True, kw_only=True, tag="made_up"):
    """Weights of nobody's model, which must never serve: what restores weights must then replace all of them."""

    random_seed: int


class DeltaFile(msgspec.Struct, frozen=True, kw_only=True, tag="delta"):
    """What has changed, in a file that every rank can read (a copy on each node will do): see weights/delta.py."""

    path: str
    digest: str | None  # that the result must have: 64 hex digits
    host_identity: str  # of the host that has looked at it
    stamp: FileStamp


WeightSource = FilesSource | InstanceSource | TrainerSource | DeltaFile | MadeUpSource


class BroadcastTensors(msgspec.Struct, frozen=True, kw_only=True, tag="broadcast"):
    """Tensors that a trainer broadcasts in a group that all ranks have joined, in this order."""

    group: str
    names: list[str]
    dtypes: list[str]  # as an arena names them
    shapes: list[list[int]]
    bucket_nbytes: int | None = None  # several in one broadcast, which ends with the tensor that exceeds so many bytes
    timeout_s: float = 300.0  # for each broadcast
    call: int = 0  # which it is of those that a trainer has made since the group was made; 0: nobody counts


class PickledTensors(msgspec.Struct, frozen=True, kw_only=True, tag="pickled_tensors"):
    """Tensors that a process of the same host has pickled, as SGLang's trainers do."""

    payloads: list[bytes]  # one for all tensor-parallel ranks, or one for each
    load_format: str | None  # flattened_bucket; direct: what ranks hold, by their own names
    host_identity: str  # of the host on which they have arrived


class LentTensors(msgspec.Struct, frozen=True, kw_only=True, tag="lent_tensors"):
    """Tensors in buffers that processes of the same host lend, one to each rank: checkpoint-engine's way."""

    sockets: dict[str, str]  # ZeroMQ address by the rank's key: "GPU-<uuid>", or "CPU-<world rank>"
    timeout_s: float = 300.0  # between two messages


# Where the tensors of one call of a session are.
TensorsSource = PickledTensors | BroadcastTensors | LentTensors


class StageWeightsReq(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Have other content ready beside what serves, verified. A replica's leader hands it on to its other ranks."""

    request_id: str
    number: int  # of the content: above 0, and never used before
    source: WeightSource


class PutTensorsReq(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Put tensors into a stage that is still open. Handed on in the same way."""

    request_id: str
    number: int  # of the content that the stage becomes
    is_first: bool  # whether there is no such stage yet
    source: TensorsSource


class SealWeightsReq(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Verify what has been put into a stage: it can be switched to afterwards. Handed on in the same way."""

    request_id: str
    number: int


class OfferWeightsReq(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Offer the weights that serve to other instances, or end the offer. Handed on in the same way."""

    request_id: str
    is_offered: bool


class SwitchWeightsReq(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Serve staged content from the next pass on, and stage what has served. Handed on in the same way."""

    request_id: str
    number: int
    version: str  # its name


class DropWeightsReq(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Forget staged content, or that which is being staged, if there is any. Handed on in the same way."""

    request_id: str
    number: int


class JoinGroupReq(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Become a member of a group in which a trainer is rank 0, in the place of one of that name. Handed on likewise."""

    request_id: str
    name: str
    number: int  # above 0; of the instance's groups, never used before
    host: str  # of the trainer's store
    port: int
    rank_offset: int  # of the instance's rank 0
    size: int
    backend: str  # "nccl", "gloo", or "auto": as the device has it
    is_stateless: bool = False  # a group of vLLM's
    timeout_s: float = 300.0  # for all members to come


class LeaveGroupReq(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Leave a group, if there is one: whatever is waited for in it ends. Handed on in the same way."""

    request_id: str
    name: str
    number: int  # another group may have the name by now


class WeightStepOutput(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A replica's leader to the main process: all ranks of the replica have taken a step, or why not."""

    request_id: str
    success: bool
    message: str = ""
    source: str = ""  # of what was staged, as a LoadReport has it
    num_bytes: int = 0  # that came, on all ranks
    seconds: float = 0.0  # that staging took
    transfer_s: float = 0.0  # of these, those in which bytes moved; 0 where that is not taken apart
    pause_s: float = 0.0  # between two passes, for a switch
    num_reqs: int = 0  # that ran or waited at a switch
    in_host_memory: bool = False  # some of what was staged is in host memory, for want of room on a GPU
    lacks_memory: bool = False  # all that it has failed for
    lacks: str = ""  # names of tensors that have not come, if the weights are to be whole
    received: str = ""  # a digest of the tensors that have come to each of them, or of the files that it has found


LongWeightStep = StageWeightsReq | PutTensorsReq | SealWeightsReq | OfferWeightsReq  # goes on beside passes
WeightStep = LongWeightStep | SwitchWeightsReq | DropWeightsReq | JoinGroupReq | LeaveGroupReq
