"""Owns finding weights that are to replace those that serve: in files, or in another instance. Moves none."""

import dataclasses
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ramet.srt.configs.load_config import LoadConfig
from ramet.srt.configs.model_config import ModelConfig
from ramet.srt.managers.published_sources import FoundPublication, find_publication
from ramet.srt.model_loader.checkpoint.file_stamps import file_stamp, file_stamps
from ramet.srt.model_loader.remote_instance_weight_loader_utils import SeedServer, fetch_seed_answer
from ramet.srt.utils.hub import resolve_model_path
from ramet.srt.utils.net import SeedAddress, host_identity, split_address
from ramet.srt.weights.errors import WeightTransferError
from ramet.srt.weights.manifest import WeightChecksums
from ramet.srt.weights.registration import SeedAnswer
from ramet.srt.weights.update_messages import DeltaFile, FilesSource, InstanceSource
from ramet.srt.weights.version import DEFAULT_VERSION

if TYPE_CHECKING:
    from ramet.srt.modelexpress.client.listed_version import VersionSearch, WantedVersion
    from ramet.srt.modelexpress.client.seed_info import InfoAddress

SCHEMES = {"http://": "http", "https://": "https"}
ROLE = "target"


@dataclass(frozen=True)
class FoundFiles:
    """A checkpoint, or a delta."""

    source: FilesSource | DeltaFile
    origin: str
    model_path: str | None
    version = None  # it gets a name here

    def is_unchanged(self) -> bool:
        """The ranks have made sure."""
        return True

    def end(self, *, has_it: bool) -> None:
        """Nobody waits for it."""


def find_files(config: ModelConfig, path: str, revision: str | None, digest: str | None) -> FoundFiles:
    """The checkpoint of a folder or hub id, if its model is computed as the one that serves.

    Args:
        config: of the model that serves, as its files have it: what ranks quantise while they read says nothing here.

    Raises:
        ValueError: if there is none, or it is of another model.
    """
    folder = resolve_model_path(path, revision)
    files = file_stamps(folder)
    if os.path.exists(os.path.join(folder, "config.json")):  # a trainer may write weights alone
        is_embedding = config.embedding is not None
        other = ModelConfig.from_path(folder, dtype=config.dtype, is_embedding=is_embedding)
        if different := config.differences(other):
            raise ValueError(f"{folder} is another model than the one that serves: its {', '.join(different)} differs")
    source = FilesSource(path=path, revision=revision, digest=digest, host_identity=host_identity(), files=files)
    return FoundFiles(source, path if revision is None else f"{path}@{revision}", path)


def find_delta(path: str, digest: str | None, base: str | None, serving: str) -> FoundFiles:
    """A delta, which the ranks look into.

    Args:
        digest: that its result must have.
        base: the name of the version that it belongs on; None: whatever its hashes say.
        serving: the name of the version that serves.

    Raises:
        ValueError: if there is no such file, or another version serves.
    """
    if base not in (None, serving):
        raise ValueError(f"the delta is on top of the version {base!r}, and {serving!r} serves")
    source = DeltaFile(path=path, digest=digest, host_identity=host_identity(), stamp=file_stamp(path))
    return FoundFiles(source, f"{path} on top of {serving}", None)


@dataclass(frozen=True)
class FoundInstance:
    """A running instance, and what it had when it was found."""

    source: InstanceSource
    origin: str
    config: LoadConfig
    content: tuple[WeightChecksums, ...]  # of all its ranks
    model_path: str | None = None
    version: str | None = None  # None: it gets a name here

    def is_unchanged(self) -> bool:
        """Whether all of its ranks still have the same: what the own ranks have taken is of one piece then.

        Raises:
            WeightTransferError: if it does not answer.
        """
        server = _server(self.source, self.config)
        first = fetch_seed_answer(server, 0, ROLE, self.config.timeout_s)
        return _content(server, first, self.config.timeout_s) == self.content

    def end(self, *, has_it: bool) -> None:
        """Nobody waits for it."""


def instance_source(address: str, digest: str | None = None) -> InstanceSource:
    """The instance at "host:port", "http://host:port" or "https://host:port"; else raises ValueError."""
    scheme = next((scheme for scheme in SCHEMES if address.startswith(scheme)), "http://")
    host, port = split_address(address.removeprefix(scheme).rstrip("/"), "the address of an instance")
    return InstanceSource(host=host, port=port, scheme=SCHEMES[scheme], digest=digest)


def find_instance(
    config: LoadConfig, address: str, digest: str | None, *, keeps_name: bool = False
) -> FoundInstance | FoundPublication:
    """The instance at "host:port", "http://host:port" or "https://host:port", or a trainer at those of all its ranks.

    Args:
        keeps_name: an instance's weights keep their version's name, unless they are given another.

    Raises:
        ValueError: if that is no address, or its weights have no checksums.
        WeightTransferError: if it does not answer.
    """
    sources = [instance_source(one.strip(), digest) for one in address.split(",")]
    source = sources[0]
    first = fetch_seed_answer(_server(source, config), 0, ROLE, config.timeout_s)
    if first.published is not None:
        addresses = [SeedAddress(one.host, one.port, one.scheme) for one in sources]
        return find_publication(lambda: addresses, config, digest)
    if len(sources) > 1:
        raise ValueError(f"{source.host}:{source.port} is an instance, of which one address is enough")
    content = _content(_server(source, config), first, config.timeout_s)
    name = first.manifest.weight_version if keeps_name and first.manifest is not None else None
    return FoundInstance(source, address, config, content, version=name)


def find_listed(
    config: LoadConfig,
    model_name: str | None,
    version: str,
    own: tuple[str, int],
    digest: str | None,
    *,
    may_give: bool = False,
) -> FoundInstance | FoundPublication:
    """An instance that a metadata server lists with that version of the model's weights, or else a trainer.

    Args:
        model_name: as it is listed; None: as this instance is.
        own: host and port of this instance.
        version, may_give: see VersionSearch.

    Raises:
        ValueError: if this instance knows no metadata server, or that one none that answers.
        ModelExpressError: if the server can't be reached.
    """
    if config.modelexpress_url is None:
        raise ValueError("this instance knows no metadata server that could be asked (--modelexpress-config)")
    from ramet.srt.modelexpress.client.client import ModelExpressError  # needs grpc
    from ramet.srt.modelexpress.client.listed_version import VersionSearch, WantedVersion

    wanted = WantedVersion(
        model_name=model_name or config.modelexpress_model_name,
        version=version,
        host=own[0],
        port=own[1],
        dtype=config.modelexpress_dtype,
        quantization=config.modelexpress_quantization,
    )
    search = VersionSearch(config, wanted, may_give=may_give)
    try:
        return _find_by(search, wanted, config, digest)
    except BaseException as error:
        search.release(has_it=False)
        if isinstance(error, ModelExpressError):
            raise ValueError(str(error)) from error
        raise


def _find_by(
    search: "VersionSearch", wanted: "WantedVersion", config: LoadConfig, digest: str | None
) -> FoundInstance | FoundPublication:
    failures: dict[InfoAddress, str] = {}
    while True:
        listed = search.find(failures)
        for address in listed.instances or ([] if listed.trainer else listed.others):
            try:
                return _found_at(address, wanted.version, config, digest)
            except (ValueError, WeightTransferError) as error:
                failures[address] = str(error)
        if listed.instances:
            continue
        if not listed.trainer:
            nobody = f"the metadata server lists no ready instance of {wanted.model_name!r} with the version " \
                     f"{wanted.version!r}, and no trainer"  # fmt: skip
            raise ValueError("; ".join(failures.values()) or nobody)

        def look() -> list[SeedAddress]:
            return [address.seed for address in search.ranks_of_trainer()]

        found = find_publication(look, config, digest, version=wanted.version, is_listed=True)
        return dataclasses.replace(found, on_end=search.release)


def _found_at(address: "InfoAddress", wanted: str, config: LoadConfig, digest: str | None) -> FoundInstance:
    """The instance there, if it has what is wanted by its own answer, too: its record may be late."""
    source = InstanceSource(host=address.host, port=address.port, scheme=address.scheme, digest=digest, is_listed=True)
    server = _server(source, config)
    first = fetch_seed_answer(server, 0, ROLE, config.timeout_s)
    content = _content(server, first, config.timeout_s)
    manifest = first.manifest
    if manifest is None or wanted not in (manifest.weight_version, manifest.revision, first.weights_digest):
        now = "" if manifest is None else f": it is {manifest.weight_version!r} now"
        raise ValueError(f"{server.name} does not have {wanted!r} any more{now}")
    version = None if manifest.weight_version == DEFAULT_VERSION else manifest.weight_version
    return FoundInstance(source, server.name, config, content, version=version)


def _server(source: InstanceSource, config: LoadConfig) -> SeedServer:
    address = SeedAddress(source.host, source.port, source.scheme)
    return SeedServer(address, config.api_keys, config.ssl_ca_certs, shows_keys=not source.is_listed)


def _content(server: SeedServer, first: SeedAnswer, timeout_s: float) -> tuple[WeightChecksums, ...]:
    """The checksums of all ranks of an instance, of which rank 0 has answered."""
    content: list[WeightChecksums] = []
    answer = first
    while True:
        manifest = answer.manifest
        if manifest is None or manifest.checksums is None:
            raise ValueError(f"{server.name} does not say the checksums of its weights")
        content.append(manifest.checksums)
        if len(content) >= manifest.parallel.world_size:
            return tuple(content)
        answer = fetch_seed_answer(server, len(content), ROLE, timeout_s)
