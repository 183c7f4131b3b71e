"""Owns the question to a metadata server whether a model's sources have the embedding's table as their output head."""

import logging
import time

from ramet.srt.configs.load_config import LoadConfig
from ramet.srt.modelexpress.client.client import ModelExpressClient, ModelExpressError
from ramet.srt.modelexpress.client.discovery import MAX_POLL_S, POLL_S, find_other_topologies, find_sources
from ramet.srt.modelexpress.records import read_facts
from ramet.srt.modelexpress.source_identity import make_source_identity
from ramet.srt.weights.manifest import WeightManifest

logger = logging.getLogger(__name__)


def look_whether_tied(config: LoadConfig, manifest: WeightManifest, *, can_read_files: bool) -> bool | None:
    """What a READY source says of its output head; None if there is none that does.

    Args:
        can_read_files: otherwise a source is waited for, as the load would do.

    Raises:
        ValueError: if a certificate or token file can't be read.
    """
    identity = make_source_identity(config, manifest)
    client = ModelExpressClient(config.modelexpress_url)
    deadline, pause = time.monotonic() + config.modelexpress_wait_s, POLL_S
    try:
        while True:
            try:
                refs = find_sources(client, identity, manifest.parallel.shard_rank)
                refs = refs or [ref for other in find_other_topologies(client, identity) for ref in other.sources]
            except ModelExpressError as error:
                logger.debug("no source says whether its output head is tied: %s", error)
                return None
            words = [facts.is_tied for ref in refs if (facts := read_facts(ref.topology)) is not None]
            if refs or can_read_files or time.monotonic() > deadline:
                return next((word for word in words if word is not None), None)
            time.sleep(pause)
            pause = min(MAX_POLL_S, 2 * pause)
    finally:
        client.close()
