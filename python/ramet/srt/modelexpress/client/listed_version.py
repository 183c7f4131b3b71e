"""Owns the question to a metadata server who has one version of a model's weights: instances, or else a trainer.

So that each byte leaves a trainer about once, one instance of those that hold the weights alike takes them from there
at a time; the others wait until it has them. Who that is, the claim says by which one of several reads the files.
"""

import logging
import random
import socket
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from ramet.srt.configs.load_config import LoadConfig
from ramet.srt.modelexpress.client.claim import FileClaim
from ramet.srt.modelexpress.client.client import ModelExpressClient, ModelExpressError
from ramet.srt.modelexpress.client.discovery import drop_dead, order_sources
from ramet.srt.modelexpress.client.publisher import READY
from ramet.srt.modelexpress.client.seed_info import InfoAddress, read_info_url
from ramet.srt.modelexpress.proto import p2p_pb2
from ramet.srt.modelexpress.records import InstanceFacts, read_source
from ramet.srt.modelexpress.source_identity import EngineValues, build_source_identity
from ramet.srt.utils.net import format_url

logger = logging.getLogger(__name__)

POLL_S = 0.3
LISTING_S = 10.0  # for the own record to be READY after an update


@dataclass(frozen=True, kw_only=True)
class WantedVersion:
    """What is looked for, and by whom."""

    model_name: str  # as records have it
    version: str  # its name, a revision, or the digest of the weights
    host: str  # of the instance that asks, which is none of those that have it
    port: int
    dtype: str = ""  # as it holds the weights; "" matches any
    quantization: str = ""


@dataclass
class Listed:
    """Who says that they have it, the best first. What they say proves nothing."""

    instances: list[InfoAddress] = field(default_factory=list)  # that hold the weights as the one that asks
    others: list[InfoAddress] = field(default_factory=list)  # that hold them in another type
    trainer: list[InfoAddress] = field(default_factory=list)  # the ranks of one run of a trainer


def look_for_version(client: ModelExpressClient, wanted: WantedVersion) -> Listed:
    """Who has the version, READY. Raises ModelExpressError if the server can't be reached."""
    listed, places = Listed(), set[tuple[str, int]]()
    runs: dict[str, tuple[float, list[InfoAddress]]] = {}
    for ref in order_sources(drop_dead(client.list_sources(status=READY, model_name=wanted.model_name))):
        answer = client.get_metadata(ref.mx_source_id, ref.worker_id)
        if not answer.found or answer.worker.status != READY:
            continue
        source = read_source(answer)
        facts = source.facts
        if not source.info_url or facts is None:
            continue  # of another engine, which nobody can be asked about
        if wanted.version not in (facts.weight_version, answer.identity.revision, facts.weights_digest):
            continue
        try:
            address = read_info_url(source.info_url)
        except ValueError:
            continue
        if address[:2] == (wanted.host, wanted.port) or address[:2] in places:
            continue
        places.add(address[:2])
        if facts.trainer_run is not None:
            started, ranks = runs.get(facts.trainer_run, (0.0, []))
            runs[facts.trainer_run] = max(started, facts.started_at), [*ranks, address]
        elif _holds_alike(answer.identity, wanted):
            listed.instances.append(address)
        else:
            listed.others.append(address)
    if runs:
        listed.trainer = max(runs.values(), key=lambda run: run[0])[1]
    return listed


def _holds_alike(identity: p2p_pb2.SourceIdentity, wanted: WantedVersion) -> bool:
    return not wanted.dtype or (identity.dtype, identity.quantization) == (wanted.dtype, wanted.quantization)


class VersionSearch:
    """A search for a version, which may come to hold the claim to take it from a trainer. Not for two threads at once.

    Args:
        config: of the instance that asks.
        may_give: whether it will be listed with the version when it serves it, so that others can wait for it.
    """

    def __init__(self, config: LoadConfig, wanted: WantedVersion, *, may_give: bool) -> None:
        self._url = config.modelexpress_url
        self._wanted = wanted
        self._wait_s = config.modelexpress_wait_s
        self._claim = FileClaim(self._open, self._identity(), self._facts(), purpose=f"trainer:{wanted.version}")
        self._may_give = may_give

    def find(self, failed: Collection[InfoAddress]) -> Listed:
        """Who to ask now: instances if there are any, else a trainer, once it is this instance's turn.

        Args:
            failed: instances that have been tried in vain.

        Raises:
            ModelExpressError: if the server can't be reached, or does not take the claim.
            ValueError: if nobody's turn ends.
        """
        deadline = time.monotonic() + self._wait_s
        with self._client() as client:
            while True:
                listed = self._look(client, failed)
                if listed.instances or not listed.trainer or not self._may_give:
                    return listed
                if self._claim.try_acquire(client):
                    listed = self._look(client, failed)  # whoever had the claim may be listed by now
                    if listed.instances:
                        self._claim.release()
                    return listed
                if time.monotonic() > deadline:
                    raise ValueError(f"others have taken {self._wanted.version!r} from its trainer for "
                                     f"{self._wait_s:g} s, and don't give it on")  # fmt: skip
                time.sleep(POLL_S * random.uniform(0.7, 1.3))

    def _look(self, client: ModelExpressClient, failed: Collection[InfoAddress]) -> Listed:
        listed = look_for_version(client, self._wanted)
        listed.instances = [address for address in listed.instances if address not in failed]
        return listed

    def ranks_of_trainer(self) -> list[InfoAddress]:
        """Those of its newest run that are listed by now. Raises ModelExpressError if the server can't be reached."""
        with self._client() as client:
            return look_for_version(client, self._wanted).trainer

    def release(self, *, has_it: bool) -> None:
        """End the own turn, if it is that: once this instance is listed with the version, if it has it."""
        if not self._claim.held:
            return
        if not has_it:
            self._claim.release()
            return
        threading.Thread(target=self._hand_over, name="hand-over-trainer", daemon=True).start()

    def _hand_over(self) -> None:
        anybody = WantedVersion(model_name=self._wanted.model_name, version=self._wanted.version, host="", port=0)
        own = self._wanted.host, self._wanted.port
        deadline = time.monotonic() + LISTING_S
        try:
            with self._client() as client:
                while time.monotonic() < deadline:
                    listed = look_for_version(client, anybody)
                    if own in [address[:2] for address in (*listed.instances, *listed.others)]:
                        break
                    time.sleep(POLL_S)
        except ModelExpressError as error:
            logger.warning("others may take the weights from the trainer, too: %s", error)
        finally:
            self._claim.release()

    def _open(self) -> ModelExpressClient:
        return ModelExpressClient(self._url)

    @contextmanager
    def _client(self) -> Iterator[ModelExpressClient]:
        client = self._open()
        try:
            yield client
        finally:
            client.close()

    def _identity(self) -> p2p_pb2.SourceIdentity:
        """The same for all that hold the weights alike, in whatever topology."""
        wanted = self._wanted
        values = EngineValues(model_name=wanted.model_name, dtype=wanted.dtype, quantization=wanted.quantization)
        return build_source_identity(values)

    def _facts(self) -> InstanceFacts:
        instance = format_url(self._wanted.host, self._wanted.port)
        return InstanceFacts(instance=instance, host=socket.gethostname(), started_at=time.time())
