"""Owns the question to a metadata server where an instance runs that serves one version of a model's weights."""

from ramet.srt.modelexpress.client.client import ModelExpressClient
from ramet.srt.modelexpress.client.discovery import drop_dead, fetch_source, order_sources
from ramet.srt.modelexpress.client.publisher import READY
from ramet.srt.modelexpress.client.seed_info import InfoAddress, read_info_url


def look_for_version(url: str | None, model_name: str, version: str, own: tuple[str, int]) -> list[InfoAddress]:
    """READY instances that say that they serve it, the best first. What they say proves nothing.

    Args:
        url: of the server; None takes the environment's.
        model_name: as their records have it.
        version: the name of a version, a revision, or the digest of the weights.
        own: host and port of the instance that asks, which is none of them.

    Raises:
        ModelExpressError: if the server can't be reached.
        ValueError: if a certificate or token file can't be read.
    """
    client = ModelExpressClient(url)
    try:
        found: dict[tuple[str, int], InfoAddress] = {}
        for ref in order_sources(drop_dead(client.list_sources(status=READY, model_name=model_name))):
            source = fetch_source(client, ref)
            if source is None or not source.info_url or source.facts is None:
                continue  # of another engine, which nobody can be asked about
            answer = client.get_metadata(ref.mx_source_id, ref.worker_id)
            facts = source.facts
            if version not in (facts.weight_version, answer.identity.revision, facts.weights_digest):
                continue
            try:
                address = read_info_url(source.info_url)
            except ValueError:
                continue
            if address[:2] != own:
                found.setdefault(address[:2], address)
        return list(found.values())
    finally:
        client.close()
