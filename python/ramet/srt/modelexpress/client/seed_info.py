"""Owns the way from a source to what its seed says of a rank's weights: the URL to ask at, or the record itself."""

from typing import NamedTuple
from urllib.parse import parse_qs, urlencode, urlsplit

from ramet.srt.modelexpress.records import SourceRecord
from ramet.srt.utils.net import SeedAddress
from ramet.srt.weights.agreement import find_other_head
from ramet.srt.weights.errors import WeightTransferError, name_some
from ramet.srt.weights.manifest import WeightManifest, element_size
from ramet.srt.weights.registration import SeedAnswer

INFO_PATH = "/remote_instance_transfer_engine_info"


class InfoAddress(NamedTuple):
    """Where an instance answers for one rank."""

    host: str
    port: int
    rank: int  # world rank in the seed's instance
    role: str
    scheme: str = "http"

    @property
    def seed(self) -> SeedAddress:
        return SeedAddress(self.host, self.port, self.scheme)


def make_info_url(address: InfoAddress) -> str:
    """The URL that a record holds as its metadata_endpoint."""
    query = urlencode({"rank": address.rank, "role": address.role})
    return f"{address.seed.url}{INFO_PATH}?{query}"


def read_info_url(url: str) -> InfoAddress:
    """What make_info_url was given.

    Raises:
        ValueError: if it is not such a URL.
    """
    parts = urlsplit(url)
    query = parse_qs(parts.query)
    rank = query.get("rank", [""])[0]
    if not parts.hostname or parts.port is None or not (rank.isascii() and rank.isdigit()):
        raise ValueError(f"{url!r} does not say host, port and rank")
    scheme = "https" if parts.scheme == "https" else "http"
    return InfoAddress(parts.hostname, parts.port, int(rank), query.get("role", ["target"])[0], scheme)


def make_seed_answer(source: SourceRecord, manifest: WeightManifest) -> SeedAnswer:
    """What an engine that has no such URL would answer, from the tensors in its record.

    Matched are name and size, and the type where the record says it (SGLang's first integration does not).

    Raises:
        WeightTransferError: if the source lacks a tensor of `manifest`, or has another size, type or head.
    """
    tensors = {tensor.name: tensor for tensor in source.tensors}
    rank, seed = manifest.parallel.world_rank, source.session_id or source.worker_id
    if not source.session_id:
        raise WeightTransferError("agree", rank, seed, "its record has no session of the transfer engine")
    other_head = find_other_head(manifest, {name: tensor.addr for name, tensor in tensors.items()})
    if other_head is not None:
        raise WeightTransferError("agree", rank, seed, other_head)
    if missing := [entry.name for entry in manifest.entries if entry.name not in tensors]:
        raise WeightTransferError("agree", rank, seed, f"its record lacks {name_some(missing)}")
    weights_info = {}
    for entry in manifest.entries:
        tensor = tensors[entry.name]
        if tensor.nbytes != entry.nbytes or tensor.dtype not in ("", entry.dtype):
            theirs = f"{tensor.nbytes} bytes of {tensor.dtype or 'some type'}"
            cause = f"{entry.name} has {theirs} there and {entry.nbytes} bytes of {entry.dtype} here"
            raise WeightTransferError("agree", rank, seed, cause)
        size = element_size(entry.dtype)
        weights_info[entry.name] = (tensor.addr, tensor.nbytes // size, size)
    return SeedAnswer(
        rank=rank,
        remote_instance_transfer_engine_info=(source.session_id, weights_info),
        role=manifest.role,
    )
