"""Owns the search for weights: who can give them, in which order to ask, when to wait and when to read the files."""

import logging
import random
import socket
import time
from collections.abc import Collection

import msgspec

from ramet.srt.modelexpress.ages import AgeTracker
from ramet.srt.modelexpress.client.claim import FileClaim
from ramet.srt.modelexpress.client.client import NOT_TAKEN, ModelExpressClient, ModelExpressError
from ramet.srt.modelexpress.client.publisher import INITIALIZING, INITIALIZING_INTERVAL_S, READY
from ramet.srt.modelexpress.proto import p2p_pb2
from ramet.srt.modelexpress.records import SourceRecord, read_facts, read_source
from ramet.srt.modelexpress.source_identity import compute_source_id, same_model

logger = logging.getLogger(__name__)

POLL_S = 0.3
MAX_POLL_S = 2.0
POLL_SHARE = 0.05  # of the time already waited: a hundred that wait for minutes must not keep the server busy
UNKNOWN_LOAD = 0.5  # of a source that does not say how busy it is
INITIALIZING_SILENCE_S = 4 * INITIALIZING_INTERVAL_S  # an initializing source that is silent for so long has died
# Asking again would not help; a claim that is not taken has been put up again and again already.
FINAL_CODES = ("UNAUTHENTICATED", "PERMISSION_DENIED", "UNIMPLEMENTED", NOT_TAKEN)
MAX_NAMED = 5  # other models, in a message
OUTAGE_S = 10.0  # a server that fails for so long while one waits is given up


class Search(msgspec.Struct, kw_only=True):
    """What a search came to: sources to try in this order, or, when there are none, the files."""

    sources: list[p2p_pb2.SourceInstanceRef]
    holds_claim: bool = False  # with no sources: the claim to read the files is ours
    reason: str = ""  # with no sources and no claim: why nothing was found


class OtherTopology(msgspec.Struct, kw_only=True):
    """READY sources of the same model, sharded in another way."""

    identity: p2p_pb2.SourceIdentity
    sources: list[p2p_pb2.SourceInstanceRef]  # of all ranks, of all instances


def order_sources(refs: list[p2p_pb2.SourceInstanceRef]) -> list[p2p_pb2.SourceInstanceRef]:
    """Those of this host first, then the least busy; equal ones in random order, so that clients spread over them."""
    here = socket.gethostname()

    def distance(ref: p2p_pb2.SourceInstanceRef) -> tuple[bool, float, float]:
        facts = read_facts(ref.topology)
        load = ref.source_load if ref.HasField("source_load") else UNKNOWN_LOAD
        return facts is None or facts.host != here, round(min(1.0, max(0.0, load)), 2), random.random()

    return sorted(refs, key=distance)


def find_sources(
    client: ModelExpressClient, identity: p2p_pb2.SourceIdentity, shard_rank: int
) -> list[p2p_pb2.SourceInstanceRef]:
    """READY sources of the same identity and shard rank, in the order in which to try them.

    Raises:
        ModelExpressError: if the server cannot be reached.
    """
    return order_sources(client.list_sources(identity, status=READY, worker_rank=shard_rank))


def drop_dead(
    refs: list[p2p_pb2.SourceInstanceRef], failed: Collection[str] = (), own_instance: str = ""
) -> list[p2p_pb2.SourceInstanceRef]:
    """Without those that were tried in vain, and without records that a crashed instance has left at an address where
    another one runs: the one that asks, or one with a newer record.

    Args:
        failed: worker ids.
        own_instance: URL of the instance that asks; "" if it has none.
    """
    refs = [ref for ref in refs if ref.worker_id not in failed]
    facts = {ref.worker_id: read_facts(ref.topology) for ref in refs}
    newest: dict[tuple[str, int], float] = {}
    for one in facts.values():
        if one is not None:
            place = (one.instance, one.world_rank)
            newest[place] = max(one.started_at, newest.get(place, 0.0))

    def may_live(ref: p2p_pb2.SourceInstanceRef) -> bool:
        one = facts[ref.worker_id]
        if one is None or not one.instance:
            return True
        return one.instance != own_instance and one.started_at == newest[one.instance, one.world_rank]

    return [ref for ref in refs if may_live(ref)]


def fetch_source(client: ModelExpressClient, ref: p2p_pb2.SourceInstanceRef) -> SourceRecord | None:
    """The record behind a row of a listing; None if it has gone or is no longer READY.

    Raises:
        ModelExpressError: if the server cannot be reached.
    """
    answer = client.get_metadata(ref.mx_source_id, ref.worker_id)
    return read_source(answer) if answer.found and answer.worker.status == READY else None


def find_other_topologies(client: ModelExpressClient, identity: p2p_pb2.SourceIdentity) -> list[OtherTopology]:
    """READY sources of the same model, revision, type and quantisation with other tp, pp or ep sizes.

    Servers before 0.7 do not say under which identity a record was published; there nothing is found.

    Raises:
        ModelExpressError: if the server cannot be reached.
    """
    own_id = compute_source_id(identity)
    groups: dict[str, list[p2p_pb2.SourceInstanceRef]] = {}
    for ref in client.list_sources(status=READY, model_name=identity.model_name):
        if ref.mx_source_id != own_id:
            groups.setdefault(ref.mx_source_id, []).append(ref)
    found = []
    for refs in groups.values():
        answer = client.get_metadata(refs[0].mx_source_id, refs[0].worker_id)
        if answer.found and answer.HasField("identity") and same_model(identity, answer.identity):
            found.append(OtherTopology(identity=answer.identity, sources=order_sources(refs)))
    return found


def search(
    client: ModelExpressClient,
    identity: p2p_pb2.SourceIdentity,
    shard_rank: int,
    *,
    claim: FileClaim | None,
    timeout_s: float,
    failed: Collection[str] = (),
    own_instance: str = "",
    poll_s: float = POLL_S,
) -> Search:
    """Find sources; wait while one is coming; claim the files when none is.

    One rank searches for its whole instance and tells the others what came of it: if each rank claimed for itself, two
    instances could wait for each other.

    Args:
        claim: None for an instance that has no files or may not read them: it waits until the end.
        timeout_s: how long to wait for a source that is coming, or for somebody else's claim.
        failed, own_instance: see drop_dead.

    Raises:
        ModelExpressError: if the server cannot be reached for some seconds.
    """
    ages = AgeTracker(wall_ms=None)
    start = time.monotonic()
    deadline = start + timeout_s
    outage_since: float | None = None
    awaited = ""
    while True:
        now = time.monotonic()
        try:
            found, coming = look_and_claim(client, identity, shard_rank, claim, failed, ages, own_instance)
            if found is not None:
                return found
            outage_since = None
            what = "a source that is initializing" if coming else "whoever claims the files" if claim else "a source"
        except ModelExpressError as error:
            outage_since = outage_since or now
            outage_s = time.monotonic() - outage_since  # a step may have waited for the server for long
            if error.code in FINAL_CODES or outage_s >= OUTAGE_S or now >= deadline:
                release(claim)
                raise
            what = f"the server to answer ({error})"
        if what != awaited:
            awaited = what
            logger.info("no source of %s is known to be ready; waiting for %s", identity.model_name, what)
        if now >= deadline:
            release(claim)
            return Search(sources=[], reason=f"no source became ready within {timeout_s:.0f} s of waiting for {what}")
        pause_s = max(poll_s, min(MAX_POLL_S, POLL_SHARE * (now - start))) * random.uniform(0.7, 1.3)
        time.sleep(min(pause_s, max(0.0, deadline - time.monotonic())))


def look_and_claim(
    client: ModelExpressClient,
    identity: p2p_pb2.SourceIdentity,
    shard_rank: int,
    claim: FileClaim | None,
    failed: Collection[str],
    ages: AgeTracker,
    own_instance: str = "",
) -> tuple[Search | None, bool]:
    """One step of a search: what it came to, if it came to an end; and whether a source is coming."""
    sources, coming = look(client, identity, shard_rank, failed, ages, own_instance)
    if not sources and not coming and claim is not None and claim.try_acquire(client):
        # Whoever held the claim before may have become a source since the look.
        sources, coming = look(client, identity, shard_rank, failed, ages, own_instance)
        if not sources and not coming:
            return Search(sources=[], holds_claim=True), False
    if sources or coming:
        release(claim)
    return Search(sources=sources) if sources else None, bool(coming)


def release(claim: FileClaim | None) -> None:
    if claim is not None:
        claim.release()


def look(
    client: ModelExpressClient,
    identity: p2p_pb2.SourceIdentity,
    shard_rank: int,
    failed: Collection[str],
    ages: AgeTracker,
    own_instance: str,
) -> tuple[list[p2p_pb2.SourceInstanceRef], list[p2p_pb2.SourceInstanceRef]]:
    """The sources that are READY, and when there are none, those that are coming."""
    sources = drop_dead(find_sources(client, identity, shard_rank), failed, own_instance)
    coming = [] if sources else drop_dead(find_coming(client, identity, shard_rank, ages), failed, own_instance)
    return sources, coming


def find_coming(
    client: ModelExpressClient, identity: p2p_pb2.SourceIdentity, shard_rank: int, ages: AgeTracker
) -> list[p2p_pb2.SourceInstanceRef]:
    """INITIALIZING sources of the same identity and shard rank that show signs of life.

    Raises:
        ModelExpressError: if the server cannot be reached.
    """
    refs = client.list_sources(identity, status=INITIALIZING, worker_rank=shard_rank)
    return [
        ref
        for ref in refs
        if ages.age_s(ref.mx_source_id, ref.worker_id, ref.worker_rank, ref.updated_at) <= INITIALIZING_SILENCE_S
    ]


def describe_others(client: ModelExpressClient, identity: p2p_pb2.SourceIdentity) -> str:
    """What READY weights the server lists that are not those of `identity`, and why not; "" if there are none.

    Raises:
        ModelExpressError: if the server cannot be reached.
    """
    own_id = compute_source_id(identity)
    others = {ref.mx_source_id: ref for ref in client.list_sources(status=READY) if ref.mx_source_id != own_id}
    names = {ref.model_name for ref in others.values()} - {identity.model_name}
    reasons = []
    for ref in [ref for ref in others.values() if ref.model_name == identity.model_name][:MAX_NAMED]:
        answer = client.get_metadata(ref.mx_source_id, ref.worker_id)
        if answer.found and (differences := differing_fields(identity, answer.identity)):
            reasons.append(f"some of {identity.model_name!r} with {differences}")
    if names:
        last = identity.model_name.rstrip("/").rpartition("/")[2].casefold()
        alike = sorted(name for name in names if name.rstrip("/").rpartition("/")[2].casefold() == last)
        shown = (alike or sorted(names))[:MAX_NAMED]
        reasons.append(
            f"some named {', '.join(map(repr, shown))}, where this instance has {identity.model_name!r} (if that is "
            "the same model, give both sides one model_name in --modelexpress-config)"
        )
    return "; ".join(reasons)


def differing_fields(own: p2p_pb2.SourceIdentity, other: p2p_pb2.SourceIdentity) -> str:
    """In what two identities of one model differ, except for the sizes of their parallel dimensions."""
    return ", ".join(
        f"{field} {getattr(other, field) or 'none'!r} (here {getattr(own, field) or 'none'!r})"
        for field in ("revision", "dtype", "quantization", "mx_version", "backend_framework")
        if getattr(own, field) != getattr(other, field)
    )
