"""Owns what a seed says of one rank's weights: the registration on the wire, and the checks of what is received."""

import msgspec

from ramet.srt.utils.outside_json import Natural, decode_json
from ramet.srt.weights.boxes import WeightRegion
from ramet.srt.weights.manifest import WeightManifest, check_manifest, check_role
from ramet.srt.weights.peer_messages import PeerLink

BEING_CHANGED = "are being changed: ask again in a moment"
ASLEEP = "are put away: the instance is asleep"
MAX_CHECKSUM_REGIONS = 4096  # in one request; a client that wants more asks again
MAX_REGISTRATION_BYTES = 64 << 20  # tens of thousands of tensors with their boxes
MAX_REGISTRATION_VALUES = 2 << 20  # in one, by the commas that it has


class TransferEngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Upstream's part of a registration."""

    session_id: str  # Mooncake's address of the rank, "host:port"
    weights_info_dict: dict[str, tuple[int, int, int]]  # name -> (address, number of elements, bytes of an element)


class LocalHandle(msgspec.Struct, frozen=True, kw_only=True):
    """How a process on the same host gets the arena's memory."""

    host_identity: str
    socket_name: str  # of a Unix socket in the abstract namespace


class ControlAddress(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where a rank listens: a name in the abstract namespace of Unix sockets, or a TCP port."""

    token: str  # whoever knows it is the instance itself
    name: str = ""
    host: str = ""
    port: int = 0


class PublishedModel(msgspec.Struct, frozen=True, kw_only=True):
    """What a trainer's rank says beside its manifest, whose boxes are of tensors as a checkpoint has them."""

    run: str  # the same for all ranks of one run of a trainer: what two runs hold is never put together
    shapes: dict[str, tuple[Natural, ...]]  # of the whole tensors of which this rank holds something


class SeedRegistration(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The body of PUT /register_transfer_engine_info. All but `rank` and `transfer_engine_info` is ours."""

    transfer_engine_info: TransferEngineInfo
    rank: int | None = None
    tp_rank: int | None = None  # what older peers send in place of `rank`
    role: str = "target"
    manifest: WeightManifest | None = None
    arena_address: int | None = None  # where the manifest's offset 0 is
    local_handle: LocalHandle | None = None
    started_at: float = 0.0  # of the instance, as its records at a metadata server have it; 0 where there are none
    link: PeerLink | None = None  # where those who take its weights hear of each other; None: nowhere
    weights_digest: str = ""  # of the checkpoint that the weights are from, where the instance knows it
    published: PublishedModel | None = None  # by a trainer; None: by an instance
    control: ControlAddress | None = None  # for the instance's main process alone: no answer has it

    @property
    def world_rank(self) -> int:
        rank = self.tp_rank if self.rank is None else self.rank
        assert rank is not None
        return rank


class SeedAnswer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The answer to GET /get_transfer_engine_info, and to the routes on the engine's own HTTP port."""

    rank: int
    remote_instance_transfer_engine_info: tuple[str, dict[str, tuple[int, int, int]]]
    role: str = "target"
    manifest: WeightManifest | None = None
    arena_address: int | None = None
    local_handle: LocalHandle | None = None
    link: PeerLink | None = None
    started_at: float = 0.0
    weights_digest: str = ""  # what it says proves nothing: a client compares what it has received
    published: PublishedModel | None = None

    @property
    def session_id(self) -> str:
        return self.remote_instance_transfer_engine_info[0]

    @property
    def weights_info(self) -> dict[str, tuple[int, int, int]]:
        return self.remote_instance_transfer_engine_info[1]


class ChecksumsRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The body of POST /remote_instance_weight_checksums on the engine's own HTTP port.

    At most MAX_CHECKSUM_REGIONS regions, which together have no more than twice the bytes of the rank's weights.
    """

    rank: int
    regions: list[WeightRegion]
    role: str = "target"


class ChecksumsAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """Its answer: a checksum for each region, over its elements in row-major order of the checkpoint tensor."""

    algorithm: str
    checksums: list[str]


class DigestTableRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The body of POST /remote_instance_weights_digest on the engine's own HTTP port."""

    rank: int
    role: str = "target"
    first: int = 0  # index of a tensor


class DigestTableAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """Its answer: a part of the table of hashes behind the seed's digest."""

    num_tensors: int  # of the whole table; 0 if the seed has none
    tensors: bytes = b""  # from the first one that was asked for on, as content_digest.encode_tensors has them


class InitSendGroupBody(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The body of POST /init_weights_send_group_for_remote_instance. From `rank` on it is ours.

    Without `rank` it is about every rank, as upstream's clients ask: `ports` has one for each.
    """

    master_address: str = ""  # of the seed; it knows it itself
    ports: str = ""  # joined by commas; empty or 0 takes a free one
    group_rank: int = 0  # of the seed
    world_size: int = 2
    group_name: str = ""  # given by upstream's clients; otherwise the seed names the group by the transfer's id
    backend: str = "nccl"
    rank: int | None = None
    role: str = "target"
    broadcasts: list[list[tuple[int, int, int, int]]] = []  # rows of the arena: offset, nbytes, count, stride
    layout: str = ""
    timeout_s: float = 60.0
    warm_up: bool = False  # a broadcast of one byte before the others, if the answer agrees


class InitSendGroupAnswer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Its answer. From `transfer_id` on it is ours."""

    success: bool
    message: str
    transfer_id: str = ""
    master_address: str = ""
    ports: str = ""
    warm_up: bool = False  # whether the seed sends the one byte that it was asked for; older seeds don't


class SendWeightsBody(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The body of POST /send_weights_to_remote_instance; `rank` as above, `group_name` is the transfer's id then."""

    master_address: str = ""
    ports: str = ""
    group_name: str
    rank: int | None = None
    role: str = "target"


class _Ranks(msgspec.Struct):
    rank: int | None = None
    tp_rank: int | None = None


def parse_registration(body: bytes | bytearray, num_ranks: int | None = None) -> SeedRegistration:
    """What `body` says. What can be refused at a glance is: all of it takes time and several times its memory.

    Args:
        num_ranks: of the instance, if known.

    Raises:
        ValueError: with the reason, if it is not a sound registration of one of these ranks.
    """
    if body.count(b",") > MAX_REGISTRATION_VALUES:
        raise ValueError(f"a registration has at most {MAX_REGISTRATION_VALUES} values")
    ranks = decode_json(body, _Ranks)
    rank = ranks.tp_rank if ranks.rank is None else ranks.rank
    if rank is None:
        raise ValueError("rank is missing")
    if rank < 0:
        raise ValueError(f"rank must not be negative; got {rank}")
    if num_ranks is not None and rank >= num_ranks:
        raise ValueError(f"rank {rank} is none of this instance's {num_ranks} ranks")
    registration = decode_json(body, SeedRegistration)
    _check(registration.role, registration.transfer_engine_info, registration.manifest, registration.arena_address)
    return registration


def make_answer(registration: SeedRegistration) -> bytes:
    """What whoever asks for this registration gets, as JSON."""
    info = registration.transfer_engine_info
    answer = SeedAnswer(
        rank=registration.world_rank,
        remote_instance_transfer_engine_info=(info.session_id, info.weights_info_dict),
        role=registration.role,
        manifest=registration.manifest,
        arena_address=registration.arena_address,
        local_handle=registration.local_handle,
        link=registration.link,
        started_at=registration.started_at,
        weights_digest=registration.weights_digest,
        published=registration.published,
    )
    return msgspec.json.encode(answer)


def parse_answer(body: bytes) -> SeedAnswer:
    """Raises ValueError with the reason if `body` is not a sound answer."""
    answer = decode_json(body, SeedAnswer)
    info = TransferEngineInfo(session_id=answer.session_id, weights_info_dict=answer.weights_info)
    _check(answer.role, info, answer.manifest, answer.arena_address)
    return answer


def _check(role: str, info: TransferEngineInfo, manifest: WeightManifest | None, arena_address: int | None) -> None:
    check_role(role)
    if not info.session_id:
        raise ValueError("session_id is empty")
    for name, (address, num_elements, element_nbytes) in info.weights_info_dict.items():
        if address < 0 or num_elements < 0 or element_nbytes < 1 or address + num_elements * element_nbytes >= 1 << 64:
            raise ValueError(f"{name}: [{address}, {num_elements}, {element_nbytes}] is no piece of memory")
    if manifest is not None:
        check_manifest(manifest)
        if manifest.role != role:
            raise ValueError(f"the manifest is of the role {manifest.role}, the registration of {role}")
        if arena_address is None or not 0 <= arena_address < (1 << 64) - manifest.arena_nbytes:
            raise ValueError("arena_address is missing or no address")
