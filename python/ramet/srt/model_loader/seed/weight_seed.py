"""Owns offering a loaded arena to others: its checksums, its transfer engine, its local socket, its registration."""

import importlib
import logging
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

import msgspec

from ramet.srt.configs.runner_config import REQUIRED, UNUSED
from ramet.srt.model_loader.arena.base import WeightArena
from ramet.srt.model_loader.checksums.entries import compute_checksums, with_checksums
from ramet.srt.model_loader.checksums.regions import RegionChecksums
from ramet.srt.model_loader.remote_instance_weight_loader_utils import register_transfer_engine_info
from ramet.srt.model_loader.seed.arena_watch import ArenaWatch
from ramet.srt.model_loader.seed.control import WeightControlServer
from ramet.srt.model_loader.seed.doors import Doors
from ramet.srt.model_loader.transport.memory_offer import (
    MemoryOffer,
    OfferFromHere,
    offer_memory,
    start_offering_process,
)
from ramet.srt.model_loader.transport.peer_hub import PeerHub
from ramet.srt.model_loader.transport.transport_process import TransportMissingError, TransportProcess
from ramet.srt.utils.net import format_address, host_identity, reachable_host
from ramet.srt.weights.content_digest import part_of_table
from ramet.srt.weights.control_messages import (
    DigestTableOutput,
    DigestTableReq,
    InitSendGroupReq,
    InstanceReady,
    InstanceStateOutput,
    InstanceStopping,
    SendWeightsReq,
    WeightChecksumsOutput,
    WeightReply,
    WeightRequest,
    WeightsRenamed,
)
from ramet.srt.weights.manifest import WeightManifest, element_size
from ramet.srt.weights.peer_messages import Holds, content_name
from ramet.srt.weights.registration import LocalHandle, SeedRegistration, TransferEngineInfo

if TYPE_CHECKING:
    from ramet.srt.model_loader.seed.send_groups import SendGroups

logger = logging.getLogger(__name__)

# Started for an offer that is still to be made, by host and rank; None where Mooncake is not installed, and needn't be.
_prepared: dict[tuple[str, int], TransportProcess | None] = {}
_preparing = threading.Lock()  # weights that arrive may be offered in another thread meanwhile
_is_missing = False  # whether Mooncake is known not to be installed: nothing changes that while this process lives


class WeightSeed:
    """One rank's weights on offer. The arena is immutable from the start on."""

    def __init__(
        self,
        registration: SeedRegistration,
        resources: ExitStack,
        answer: Callable[[WeightRequest], WeightReply],
        hub: PeerHub | None = None,
    ) -> None:
        self.registration = registration
        self._hub = hub
        self.answer = answer  # what its control socket answers with, for whoever is in this process
        self._resources = resources

    @staticmethod
    def prepare(host: str, rank: int, network: str = REQUIRED, gpu_id: int = -1) -> None:
        """Do beforehand, while the weights still come, what takes long: start the transfer engine, import requests.

        Args:
            network: see `start`.
            gpu_id: of the GPU that the weights are on; -1: none.

        Raises:
            WeightTransferError: if it does not start.
        """
        with _preparing:
            if network != UNUSED and (host, rank) not in _prepared:
                _prepared[host, rank] = _start_process(host, rank, network, gpu_id)
        importlib.import_module("ramet.srt.utils.http_client")

    @classmethod
    def start(
        cls,
        manifest: WeightManifest,
        arena: WeightArena,
        *,
        host: str,
        started_at: float = 0.0,
        control_host: str | None = None,
        network: str = REQUIRED,
        check_interval_s: float = 0.0,
        on_state: Callable[[bool], None] = lambda _is_ready: None,
        on_rename: Callable[[str], None] = lambda _version: None,
        on_change: Callable[[str], None] = logger.critical,
    ) -> "WeightSeed":
        """Publish an arena whose content is final.

        Args:
            host: address that the instance is bound to.
            started_at: when the instance was launched, in unix seconds: tells it from one that had its address before.
            control_host: address of this node, if the instance's main process may be on another one.
            network: whether other hosts may read the weights by a transfer engine: see configs/runner_config.py.
            check_interval_s: seconds from one look at the arena's content to the next; 0: nobody looks.
            on_state: called, in a thread, when the instance has become healthy (True) or is about to end (False).
            on_rename: called, in a thread, with the version by whose name the weights go from now on.
            on_change: called, in a thread, with a line that says so when the content has changed.

        Raises:
            WeightTransferError: if Mooncake does not start.
            OSError: if a socket can't be made.
        """
        start = time.perf_counter()
        checksums = arena.checksums or compute_checksums(manifest, arena)
        arena.checksums = checksums
        arena.publish()
        rank = manifest.parallel.world_rank
        with ExitStack() as undo:
            doors = _doors_of(arena, with_checksums(manifest, checksums), host, network)
            undo.callback(doors.close)
            session_id = format_address(reachable_host(host), 0) if doors.memory is None else doors.memory.session_id
            requests = SeedRequests(arena, reachable_host(host), on_state, on_rename)
            undo.callback(requests.close)
            control = WeightControlServer(requests.handle, control_host)
            undo.callback(control.close)
            if check_interval_s:
                undo.callback(ArenaWatch(arena, checksums, check_interval_s, on_change).close)
            resources = undo.pop_all()
        registration = SeedRegistration(
            rank=rank,
            role=manifest.role,
            transfer_engine_info=TransferEngineInfo(
                session_id=session_id, weights_info_dict=weights_info(manifest, doors.address)
            ),
            manifest=with_checksums(manifest, checksums),
            arena_address=doors.address,
            local_handle=LocalHandle(host_identity=host_identity(), socket_name=doors.share.name),
            link=None if doors.hub is None else doors.hub.link,
            started_at=started_at,
            weights_digest=arena.content_digest_text,
            control=control.address,
        )
        logger.info(
            "rank %d: offering %.3f GB of %s weights %s (prepared in %.2f s)",
            rank,
            manifest.payload_nbytes / 1e9,
            manifest.role,
            "without a transfer engine" if doors.memory is None else f"as {session_id}",
            time.perf_counter() - start,
        )
        return cls(registration, resources, requests.handle, doors.hub)

    def register(
        self, bootstrap_url: str, *, admin_api_key: str | None, timeout_s: float, ca_certs: str | None = None
    ) -> None:
        """Tell the instance's bootstrap server, until it has understood.

        Raises:
            WeightTransferError: if it has not within `timeout_s`: a rank that nobody can find is no running rank.
        """
        register_transfer_engine_info(
            bootstrap_url, self.registration, admin_api_key=admin_api_key, timeout_s=timeout_s, ca_certs=ca_certs
        )

    def rename(self, version: str) -> None:
        """Offer the same weights by another version's name. `register` says so."""
        registration = self.registration
        assert registration.manifest is not None
        manifest = msgspec.structs.replace(registration.manifest, weight_version=version)
        self.registration = msgspec.structs.replace(registration, manifest=manifest)

    @property
    def num_given_bytes(self) -> int:
        """That others say they have taken, of those that take piece by piece."""
        return 0 if self._hub is None else self._hub.num_given_bytes

    def close(self) -> None:
        """Withdraw the offer. Processes that have mapped the memory keep it."""
        self._resources.close()


def open_doors(arena: WeightArena, host: str, network: str, hub: PeerHub | None) -> Doors:
    """Let others come to an arena, which need not be full.

    Args:
        network: see WeightSeed.start.
        hub: becomes the doors'.

    Raises:
        WeightTransferError, OSError: as WeightSeed.start does.
    """
    return Doors(arena, _offer_memory(arena, host, arena.manifest.parallel.world_rank, network), hub)


def _doors_of(arena: WeightArena, manifest: WeightManifest, host: str, network: str) -> Doors:
    """Those that were opened while the weights came; else new ones.

    Args:
        manifest: with checksums.
    """
    doors, arena.doors = arena.doors, None
    if isinstance(doors, Doors):
        with _preparing:
            spare = _prepared.pop((host, manifest.parallel.world_rank), None)
        if spare is not None:
            spare.kill()
        return doors
    hub = PeerHub(reachable_host(host), content_name(manifest)) if arena.can_pass_on else None
    if hub is not None:
        hub.tell(Holds(is_whole=True))
    try:
        return open_doors(arena, host, network, hub)
    except BaseException:
        if hub is not None:
            hub.close()
        raise


def _offer_memory(arena: WeightArena, host: str, rank: int, network: str) -> MemoryOffer | OfferFromHere | None:
    """The arena on offer to other hosts; None where it isn't. Raises WeightTransferError and OSError as it does."""
    if network == UNUSED:
        return None
    with _preparing:
        if (host, rank) in _prepared:
            process = _prepared.pop((host, rank))
        else:
            process = _start_process(host, rank, network, arena.gpu_id)
    return None if process is None else offer_memory(arena, process)


def _start_process(host: str, rank: int, network: str, gpu_id: int) -> TransportProcess | None:
    """None if Mooncake is not installed, and needn't be. Raises WeightTransferError if it can't be started."""
    global _is_missing
    if _is_missing and network != REQUIRED:
        return None
    try:
        return start_offering_process(host, rank, gpu_id)
    except TransportMissingError as error:
        if network == REQUIRED:
            raise
        _is_missing = True
        logger.warning("rank %d: weights are offered without a transfer engine: %s", rank, error.cause)
        return None


class SeedRequests:
    """Answers what the instance's main process asks a rank on behalf of clients."""

    def __init__(
        self,
        arena: WeightArena,
        address: str,
        on_state: Callable[[bool], None] = lambda _is_ready: None,
        on_rename: Callable[[str], None] = lambda _version: None,
    ) -> None:
        """
        Args:
            address: of this node, where clients reach it.
        """
        self._arena = arena
        self._address = address
        self._on_state = on_state
        self._on_rename = on_rename
        self._checksums = RegionChecksums(arena)
        self._groups: SendGroups | None = None
        self._lock = threading.Lock()
        self._computing = threading.Lock()

    def handle(self, request: WeightRequest) -> WeightReply:
        """Raises ValueError or WeightTransferError if the request can't be fulfilled."""
        if isinstance(request, InstanceReady | InstanceStopping):
            self._on_state(isinstance(request, InstanceReady))
            return InstanceStateOutput()
        if isinstance(request, WeightsRenamed):
            self._on_rename(request.version)
            return InstanceStateOutput()
        if isinstance(request, InitSendGroupReq):
            return self._send_groups().init(request)
        if isinstance(request, DigestTableReq):
            return DigestTableOutput(**part_of_table(self._arena.content_digest, request.first))
        if isinstance(request, SendWeightsReq):
            return self._send_groups().send(request.transfer_id)
        with self._computing, self._arena.reading():  # one after the other: the rank's own passes need the time
            self._checksums.check_size(request.regions)
            checksums = self._checksums.compute(request.regions)
        return WeightChecksumsOutput(algorithm=self._checksums.algorithm, checksums=checksums)

    def _send_groups(self) -> "SendGroups":
        with self._lock:
            if self._groups is None:
                # It needs torch.distributed, and is rarely used.
                from ramet.srt.model_loader.seed.send_groups import SendGroups

                self._groups = SendGroups(self._arena, self._address)
            return self._groups

    def close(self) -> None:
        """End the transfers that wait."""
        with self._lock:
            if self._groups is not None:
                self._groups.close()


def weights_info(manifest: WeightManifest, arena_address: int) -> dict[str, tuple[int, int, int]]:
    """Upstream's description of the tensors: name -> (address, number of elements, bytes of an element)."""
    info = {}
    for entry in manifest.entries:
        size = element_size(entry.dtype)
        info[entry.name] = (arena_address + entry.offset, entry.nbytes // size, size)
    return info
