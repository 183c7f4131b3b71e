"""Owns what one rank of a trainer has on offer: a copy of its weights of one version, and who is told of it."""

import hashlib
import logging
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
import torch

from ramet.srt.configs.load_config import LoadConfig
from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.configs.runner_config import REQUIRED, UNUSED, WANTED
from ramet.srt.model_loader.arena.allocate import allocate_lendable
from ramet.srt.model_loader.arena.base import WeightArena
from ramet.srt.model_loader.seed.weight_seed import WeightSeed
from ramet.srt.modelexpress.settings import check_installed
from ramet.srt.utils.net import format_address, format_url, is_loopback, reachable_host
from ramet.srt.weights.manifest import WeightManifest, build_weight_manifest, dtype_name
from ramet.srt.weights.registration import PublishedModel
from ramet.srt.weights.version import check_shared_version
from ramet.trainer.run import run_name
from ramet.trainer.server import PublisherServer
from ramet.trainer.tensors import HEAD, Held, Weights, hold

if TYPE_CHECKING:
    from ramet.srt.modelexpress.client.publication import Publication

logger = logging.getLogger(__name__)

LISTING_TIMEOUT_S = 10.0  # for the metadata server to list a version
NETWORKS = (UNUSED, WANTED, REQUIRED)


class VersionReused(ValueError):
    """A version's name stands for other content already."""


@dataclass(frozen=True)
class Published:
    """What came of a publication."""

    version: str
    num_bytes: int  # that this rank holds
    seconds: float


class WeightPublisher:
    """Offers what this process holds of a model to instances, which take it by themselves.

    Each rank of a trainer makes one, and each publishes what it holds: nothing is agreed on between them, but that all
    call a version by the same name. Instances are told the addresses of all ranks, or find them at a metadata server
    by the model's name and the version. What is published is a copy on the same device, so that training can go on at
    once; there is never more than one.

    Use as a context manager, or call `close`.
    """

    def __init__(
        self,
        weights: Weights,
        version: str | None = None,
        *,
        metadata: str | None = None,
        model_name: str | None = None,
        dtype: torch.dtype | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        api_key: str | None = None,
        run: str | None = None,
        network: str | None = None,
    ) -> None:
        """
        Args:
            weights: a module, or tensors by the names that checkpoints of the model have: plain ones, DTensors (FSDP2,
                tensor parallelism), or Sliced ones. They are read again at each `publish`.
            version: published at once, if given.
            metadata: host:port of a metadata server; needs `model_name`.
            model_name: by which instances know the model: a hub id, a folder, or what they are told to call it.
            dtype: as which floating-point tensors are published; None: as they are.
            host: address at which others reach this process. The default is for instances of the same host.
            port: 0 takes a free one.
            api_key: that instances must have, if any.
            run: a name for this run of the trainer, the same on all ranks; what two runs hold is never put together.
                None: one that all ranks of torch.distributed's default group have, and that no other run has. Ranks
                without such a group must be given one.
            network: whether a transfer engine (Mooncake) gives the weights to other hosts: "unused", "wanted" (where it
                is installed), "required"; None: "unused" where `host` is of this host alone, else "wanted".

        Raises:
            ValueError: for a bad argument, or what can't be published.
            TypeError: for weights or a version of another type.
            OSError: if the address can't be bound.
        """
        if metadata is not None and not model_name:
            raise ValueError("a metadata server lists weights by their model's name: give model_name")
        if network is not None and network not in NETWORKS:
            raise ValueError(f"network must be one of {', '.join(NETWORKS)}; got {network!r}")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"dtype must be a floating-point type of torch's; got {dtype!r}")
        if metadata is not None:
            check_installed()
        self._weights = weights
        self._dtype = dtype
        self._metadata = metadata
        self._model_name = (
            os.path.realpath(model_name) if model_name and os.path.isdir(model_name) else model_name or ""
        )
        self._host = host
        self._network = network or (UNUSED if is_loopback(host) else WANTED)
        self._run = run
        self._contents: dict[str, bytes] = {}  # of each version that has been published: a digest of what is held
        self._started_at = time.time()
        self._seed: WeightSeed | None = None
        self._record: Publication | None = None
        self.version: str | None = None  # that is published now
        self._server = PublisherServer(host, port, api_key)
        self._server.hide()
        try:
            if version is not None:
                self.publish(version)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "WeightPublisher":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def address(self) -> str:
        """host:port at which instances find this rank."""
        return format_address(reachable_host(self._host), self._server.port)

    def publish(self, version: str, weights: Weights | None = None) -> Published:
        """Offer what the weights are now, in the place of what was offered before.

        Instances that are taking the version before start over with this one, or fail and keep what they serve.

        Args:
            version: its name: 1 to 256 printable characters, not "default" or "update-N", which are names of
                instances. Other content must have another name.
            weights: to be read from now on, in the place of those that were given.

        Raises:
            ValueError, TypeError: for a bad version, or weights that can't be published; what was offered before still
                is.
            VersionReused, MemoryError, OSError, WeightTransferError: if they can't be offered; nothing is then.
        """
        start = time.perf_counter()
        check_shared_version(version, "version")
        if weights is not None:
            self._weights = weights
        held = hold(self._weights, self._dtype)
        manifest = self._describe(held, version)
        self.withdraw()
        arena = allocate_lendable(manifest, held[0].tensor.device)
        _copy(held, arena)
        self._seed = WeightSeed.start(
            manifest, arena, host=self._host, started_at=self._started_at, network=self._network
        )
        self._check_name(version, self._seed)
        shapes = {name: shape for one in held for name, shape in one.shapes.items()}
        published = PublishedModel(run=run_name() if self._run is None else self._run, shapes=shapes)
        self._seed.registration = msgspec.structs.replace(self._seed.registration, published=published, control=None)
        self._server.show(self._seed.registration, self._seed.answer)
        if self._metadata is not None:
            self._record = self._list(self._seed, arena, published.run)
        self.version = version
        done = Published(version, manifest.payload_nbytes, time.perf_counter() - start)
        logger.info("published %.3f GB as version %s at %s in %.2f s", done.num_bytes / 1e9, version, self.address,
                    done.seconds)  # fmt: skip
        return done

    def withdraw(self) -> None:
        """Offer nothing. Who is reading host memory finishes; the memory goes when nobody has it any more."""
        self.version = None
        self._server.hide()
        if self._record is not None:
            self._record.close()
            self._record = None
        if self._seed is not None:
            self._seed.close()
            self._seed = None

    def close(self) -> None:
        """Withdraw, and free the port. May be called twice."""
        self.withdraw()
        self._server.close()

    def _describe(self, held: list[Held], version: str) -> WeightManifest:
        dtypes = [dtype_name(one.dtype) for one in held]
        has_head = any(box.checkpoint_name == HEAD for one in held for box in one.boxes)
        return build_weight_manifest(
            [(one.name, one) for one in held],
            model_name=self._model_name,
            revision="",
            dtype=max(set(dtypes), key=dtypes.count),
            quantization="",
            role="target",
            parallel=ParallelConfig(),
            is_tied=False if has_head else None,
            weight_version=version,
        )

    def _check_name(self, version: str, seed: WeightSeed) -> None:
        """Raises VersionReused, and offers nothing, if something else has been published under that name.

        A rank that is behind would have it still, and nobody could tell the two apart.
        """
        manifest = seed.registration.manifest
        assert manifest is not None and manifest.checksums is not None
        digest = hashlib.sha256(msgspec.json.encode([manifest.entries, manifest.checksums.values])).digest()
        if self._contents.setdefault(version, digest) != digest:
            self.withdraw()
            raise VersionReused(f"{version!r} has been published with other content: what is other needs another name")

    def _list(self, seed: WeightSeed, arena: WeightArena, run: str) -> "Publication":
        """Tell the metadata server, and wait for a moment until it lists the version; it need not be there."""
        from ramet.srt.modelexpress.client.publication import Publication  # needs grpc
        from ramet.srt.modelexpress.records import make_instance_facts

        manifest = seed.registration.manifest
        assert manifest is not None
        url = format_url(reachable_host(self._host), self._server.port)
        facts = make_instance_facts(url, self._started_at, manifest)
        config = LoadConfig(
            modelexpress_url=self._metadata,
            modelexpress_model_name=self._model_name,
            modelexpress_dtype=manifest.dtype,
        )
        record = Publication(
            config,
            seed.registration,
            msgspec.structs.replace(facts, trainer_run=run),
            accelerator="cuda" if arena.gpu_id >= 0 else "cpu",
            device_id=max(0, arena.gpu_id),
            load_probe=_no_load,
            claim=None,
        )
        if not record.set_ready(LISTING_TIMEOUT_S):
            logger.warning("the metadata server %s does not list version %s yet; it is told until it does",
                           self._metadata, manifest.weight_version)  # fmt: skip
        return record


def _copy(held: list[Held], arena: WeightArena) -> None:
    """Put the tensors in their places. What trains next may change them as soon as this returns."""
    entries = {entry.name: entry for entry in arena.manifest.entries}
    arena.prepare_fill(())
    arena.populate()
    with torch.no_grad():
        if held[0].tensor.is_cuda:
            torch.cuda.current_stream(held[0].tensor.device).synchronize()  # of the trainer's own work on them
        with arena.work_context():
            for one in held:
                arena.tensor(entries[one.name]).copy_(one.tensor)
            arena.synchronize()


def _no_load() -> float | None:
    return None
