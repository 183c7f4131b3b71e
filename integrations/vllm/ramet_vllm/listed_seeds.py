"""Owns finding seeds at a metadata server by what they serve. What they hold, they are asked themselves."""

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from ramet.srt.modelexpress.settings import check_installed
from ramet.srt.utils.net import SeedAddress
from ramet.srt.weights.errors import WeightTransferError

if TYPE_CHECKING:
    from ramet.srt.modelexpress.client.client import ModelExpressClient
    from ramet.srt.modelexpress.proto import p2p_pb2

MAX_SEEDS = 4  # that share the work, and replace each other
POLL_S = 0.5


def find_listed(
    url: str, *, model_name: str, dtype: str, revision: str, timeout_s: float, rank: int
) -> list[SeedAddress]:
    """Instances that the server lists as ready with these weights, whatever their sizes, the least busy first.

    Args:
        timeout_s: how long to wait for one.
        rank: the own world rank, for messages.

    Raises:
        WeightTransferError: if there is none in time.
        ValueError: if grpc is not installed, or a certificate or token file can't be read.
    """
    check_installed()
    from ramet.srt.modelexpress.client.client import ModelExpressClient, ModelExpressError
    from ramet.srt.modelexpress.source_identity import EngineValues, build_source_identity

    identity = build_source_identity(EngineValues(model_name=model_name, dtype=dtype, revision=revision))
    deadline = time.monotonic() + timeout_s
    with ModelExpressClient(url) as client:
        while True:
            reason = f"it lists no ready instance of {model_name!r} in {dtype}, not quantised"
            reason += f", of the revision {revision}" if revision else ""
            try:
                if seeds := addresses(_listed(client, identity)):
                    return seeds[:MAX_SEEDS]
            except ModelExpressError as error:
                reason = str(error)
            if time.monotonic() + POLL_S > deadline:
                raise WeightTransferError("find", rank, f"the ModelExpress server {client.address}", reason)
            time.sleep(POLL_S)


def _listed(client: "ModelExpressClient", identity: "p2p_pb2.SourceIdentity") -> "list[p2p_pb2.SourceInstanceRef]":
    from ramet.srt.modelexpress.client.discovery import drop_dead, find_other_topologies, order_sources
    from ramet.srt.modelexpress.client.publisher import READY

    refs = client.list_sources(identity, status=READY)
    refs += [ref for other in find_other_topologies(client, identity) for ref in other.sources]
    return order_sources(drop_dead(refs))


def addresses(refs: "Iterable[p2p_pb2.SourceInstanceRef]") -> list[SeedAddress]:
    """Where the instances of records answer, each once; those that are no instances of Ramet's are left out."""
    from ramet.srt.modelexpress.records import read_facts

    found: dict[SeedAddress, None] = {}
    for ref in refs:
        facts = read_facts(ref.topology)
        if facts is None or facts.trainer_run is not None:
            continue
        parts = urlsplit(facts.instance)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port:
            found[SeedAddress(parts.hostname, parts.port, parts.scheme)] = None
    return list(found)
