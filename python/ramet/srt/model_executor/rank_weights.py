"""Owns one rank's weights, from their place in an arena to their offer to other instances and its end.

They are in one of three states, each a type of its own: arriving (RankWeights), loaded, which nobody else knows of
(LoadedWeights), and offered (OfferedWeights). Who changes weights withdraws the offer, which gives loaded ones back.
"""

import functools
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
import torch

from ramet.srt.configs.load_config import NO_WEIGHTS, LoadConfig, LoadContext
from ramet.srt.configs.runner_config import WeightsConfig
from ramet.srt.model_loader.arena.base import WeightArena
from ramet.srt.model_loader.checkpoint.checkpoint_loader import OpenCheckpoint
from ramet.srt.model_loader.checkpoint.source import CheckpointSource
from ramet.srt.model_loader.checkpoint.tied_head import folder_has_own_head
from ramet.srt.model_loader.client.seed_finder import FinderMaker
from ramet.srt.model_loader.client.seeds_head import ask_whether_tied
from ramet.srt.model_loader.loader import get_model_loader
from ramet.srt.model_loader.seed.doors import Doors
from ramet.srt.model_loader.seed.weight_seed import WeightSeed, open_doors
from ramet.srt.model_loader.transport.peer_hub import PeerHub
from ramet.srt.modelexpress.settings import check_installed
from ramet.srt.utils.hub import has_weights
from ramet.srt.weights.manifest import WeightManifest
from ramet.srt.weights.report import Claim, LoadReport, PublisherStats, summarize

if TYPE_CHECKING:
    from ramet.srt.modelexpress.client.publication import Publication

logger = logging.getLogger(__name__)

REGISTRATION_TIMEOUT_S = 30.0
CHANGED_WEIGHTS_EXIT_CODE = 72


def find_own_head(config: LoadConfig, manifest: WeightManifest, model_path: str) -> bool:
    """Whether the output head is a matrix of its own, though the model's config says that it is the embedding's table.

    The own files know it; without files, the instances that have the weights.

    Args:
        manifest: of the model as its config has it.

    Raises:
        ValueError: if the files that are to be read are broken, what ModelExpress needs is not installed, or a setting
            can't be used.
    """
    if config.load_format == "dummy":
        return False
    if config.load_format == NO_WEIGHTS:
        return os.path.isdir(model_path) and has_weights(model_path) and folder_has_own_head(model_path)
    if config.reads_files:
        return folder_has_own_head(model_path)
    if has_weights(model_path):
        try:
            return folder_has_own_head(model_path)
        except ValueError as error:  # of files that may never be read
            logger.info("rank %d: the own files don't tell whether the output head is tied, the seeds may: %s",
                        manifest.parallel.world_rank, error)  # fmt: skip
    return _seeds_have_own_head(config, manifest, model_path)


def _seeds_have_own_head(config: LoadConfig, manifest: WeightManifest, model_path: str) -> bool:
    if config.modelexpress_url is None:
        return ask_whether_tied(config, manifest.role) is False
    check_installed()
    from ramet.srt.modelexpress.client.listed_head import look_whether_tied  # needs grpc

    can_read_files = config.fallback == "disk" and has_weights(config.model_path or model_path)
    return look_whether_tied(config, manifest, can_read_files=can_read_files) is False


@dataclass(frozen=True)
class RankWeights:
    """Weights that arrive: what they are, where they go to, and what they are for."""

    config: WeightsConfig
    context: LoadContext
    manifest: WeightManifest
    arena: WeightArena
    device: torch.device
    open_checkpoint: OpenCheckpoint = CheckpointSource

    def load(self, model_path: str) -> "LoadedWeights":
        """Fill the arena. For a thread of its own.

        Raises:
            ValueError, MemoryError, WeightTransferError: see ModelLoader.load_weights.
        """
        self.arena.make_current()
        loader = get_model_loader(
            self.config.load,
            self._finder_maker(),
            self.open_checkpoint,
            self._open_doors if self.config.is_seed else None,
        )
        report, claim = loader.load_weights(self.manifest, self.arena, model_path)
        rank, role = self.manifest.parallel.world_rank, self.manifest.role
        report = msgspec.structs.replace(report, weight_version=report.weight_version or self.manifest.weight_version)
        logger.info("rank %d: loaded %s weights %s", rank, role, summarize(report))
        return LoadedWeights(self, report, claim)

    def _finder_maker(self) -> FinderMaker | None:
        """Makes who finds seeds at a metadata server; None where none is asked, for addresses or files."""
        config = self.config.load
        if config.load_format != "remote_instance" or config.modelexpress_url is None:
            return None
        check_installed()
        from ramet.srt.modelexpress.client.seed_search import make_seed_search  # needs grpc

        return functools.partial(make_seed_search, config, self.context)

    def _open_doors(self, arena: WeightArena, hub: PeerHub) -> Doors:
        return open_doors(arena, self.config.host, self.config.network, hub)

    def prepare_offer(self) -> None:
        """Do beforehand, while the weights still arrive, what takes longest of offering them, if they will be offered.

        Raises:
            WeightTransferError: if the transfer engine does not start.
        """
        if self.config.is_seed:
            rank = self.manifest.parallel.world_rank
            WeightSeed.prepare(self.config.host, rank, self.config.network, self.arena.gpu_id)


class LoadedWeights:
    """Weights that are final, and that nobody else knows of."""

    def __init__(self, weights: RankWeights, report: LoadReport, claim: Claim | None):
        self.weights = weights
        self.report = report
        self.claim = claim
        self.loaded_at = time.time()
        self.num_given_bytes = 0  # by offers that have ended
        version = report.weight_version or weights.manifest.weight_version
        self.manifest = msgspec.structs.replace(weights.manifest, weight_version=version)

    @property
    def version(self) -> str:
        return self.manifest.weight_version

    def rename(self, version: str) -> None:
        """The same bytes go by another version's name from now on."""
        self.manifest = msgspec.structs.replace(self.manifest, weight_version=version)

    def offer(self, load_probe: Callable[[], float | None]) -> "OfferedWeights":
        """Let others take the weights, once they find them: see OfferedWeights.register.

        Args:
            load_probe: how busy the rank is, from 0 to 1, or None when that is not known; called in threads.

        Raises:
            WeightTransferError, OSError: if the offer can't be made.
        """
        return OfferedWeights(self, load_probe)

    def publisher_stats(self) -> PublisherStats | None:
        """What a metadata server has been told: nothing, of weights that are not offered."""
        return None

    def close(self) -> None:
        """Let another instance read the files, if this one keeps it from doing so: nobody will take the weights."""
        self.weights.arena.close_doors()
        if self.claim is not None:
            self.claim.release()


class OfferedWeights:
    """Weights that others may take, and where those look for them. The arena is immutable meanwhile."""

    def __init__(self, loaded: LoadedWeights, load_probe: Callable[[], float | None]):
        weights = loaded.weights
        self.loaded = loaded
        self.report = loaded.report
        self._load_probe = load_probe
        self._publications: list[Publication] = []  # at metadata servers: none or one
        self._bootstrap_url = ""  # where the weights are registered, once they are
        self._seed = WeightSeed.start(
            loaded.manifest,
            weights.arena,
            host=weights.config.host,
            started_at=weights.context.started_at,
            control_host=weights.config.control_host,
            network=weights.config.network,
            check_interval_s=weights.config.check_interval_s,
            on_state=self._on_instance_state,
            on_rename=self.rename,
            on_change=self._on_change,
        )

    @property
    def version(self) -> str:
        return self.loaded.version

    def register(self, bootstrap_url: str) -> None:
        """Tell the instance's bootstrap server where the weights are.

        Raises:
            WeightTransferError: if it does not take the registration: a rank that nobody finds doesn't run.
        """
        config = self.loaded.weights.config
        self._bootstrap_url = bootstrap_url
        self._seed.register(
            bootstrap_url,
            admin_api_key=config.admin_api_key,
            timeout_s=REGISTRATION_TIMEOUT_S,
            ca_certs=config.load.ssl_ca_certs,
        )

    def publish_modelexpress(self) -> None:
        """Tell the metadata server of the weights, which nobody may take before the instance is healthy.

        Raises:
            ValueError: if what ModelExpress needs is not installed, or a setting can't be used.
        """
        check_installed()
        from ramet.srt.modelexpress.client.publication import Publication
        from ramet.srt.modelexpress.records import make_instance_facts

        weights = self.loaded.weights
        facts = make_instance_facts(
            weights.context.instance_url,
            weights.context.started_at,
            self.loaded.manifest,
            self.report,
            weights.arena.content_digest_text,
            self.loaded.loaded_at,
        )
        publication = Publication(
            weights.config.load,
            self._seed.registration,
            facts,
            accelerator=weights.device.type,
            device_id=weights.device.index or 0,
            load_probe=self._load_probe,
            claim=self.loaded.claim,
        )
        self._publications.append(publication)

    def rename(self, version: str) -> None:
        """Tell everybody that the same weights go by another version's name from now on.

        Raises:
            WeightTransferError: if the bootstrap server does not take it.
        """
        self.loaded.rename(version)
        self._seed.rename(version)
        if self._bootstrap_url:
            self.register(self._bootstrap_url)
        for publication in self._publications:
            publication.rename(version)

    def _on_instance_state(self, is_ready: bool) -> None:
        """The main process says, in a thread, that the instance has become healthy, or is about to end."""
        for publication in self._publications:
            if is_ready:
                publication.set_ready()
            else:
                publication.withdraw()

    def _on_change(self, line: str) -> None:
        """Somebody has written to the weights: end the instance, and tell the metadata server."""
        logger.critical("%s; the instance can't go on", line)
        for publication in self._publications:
            publication.withdraw()
        logging.shutdown()
        os._exit(CHANGED_WEIGHTS_EXIT_CODE)

    def publisher_stats(self) -> PublisherStats | None:
        """What the metadata server has been told; None for a rank that publishes nothing."""
        return next((publication.stats() for publication in self._publications), None)

    @property
    def num_given_bytes(self) -> int:
        """That others have taken piece by piece, since the weights were loaded."""
        return self.loaded.num_given_bytes + self._seed.num_given_bytes

    def withdraw(self) -> LoadedWeights:
        """End the offer: first where others look for it. Processes that have mapped the memory keep it."""
        while self._publications:
            self._publications.pop().close()
        self.loaded.num_given_bytes += self._seed.num_given_bytes
        self._seed.close()
        return self.loaded

    def close(self) -> None:
        """End the offer for good."""
        self.withdraw()
