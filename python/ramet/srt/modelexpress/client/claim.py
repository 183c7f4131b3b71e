"""Owns the claim to read a model's files: of instances that start together one reads them, the others wait for it.

It needs nothing of a server but the four calls, and holds on any that does one call after the other. A claim is a
record without tensors, INITIALIZING, under the identity of the model with one extra parameter, so that nobody takes it
for a source of weights. The rule is Burns and Lamport's mutual exclusion with one bit per process; the bit is whether
the process's claim is up:

1. put the claim up;
2. if a claim of a smaller worker id is up, take the own one down and start again later;
3. if a claim of a larger worker id is up, wait until it is down;
4. read.

A claim that has not been renewed for some seconds, by the clock of who looks at it, is that of a dead process and does
not count. If a process was only slow, two read the files: a waste, but no harm.
"""

import logging
from collections.abc import Callable

from ramet.srt.modelexpress.ages import AgeTracker
from ramet.srt.modelexpress.client.client import NOT_TAKEN, REFUSED, ModelExpressClient, ModelExpressError
from ramet.srt.modelexpress.client.publisher import INITIALIZING, Publisher
from ramet.srt.modelexpress.proto import p2p_pb2
from ramet.srt.modelexpress.records import FACTS_KEY, InstanceFacts, encode_facts, read_facts
from ramet.srt.modelexpress.source_identity import CLAIM_PARAMETER

logger = logging.getLogger(__name__)

RENEWAL_S = 2.0
REFUSAL_S = 5.0  # of refusals of the own claim: then the server is out of order
SILENCE_S = 10.0  # a claim that is not renewed for so long is nobody's


class FileClaim:
    """One instance's claim. One rank holds it for all ranks of the instance.

    Args:
        make_client: makes a client; each attempt has its own, used from its own thread.
        identity: of the weights that the files hold.
        facts: who claims; shown on the fleet page.
        purpose: what is claimed: the model's files, or something of the same kind.
        ack_timeout_s: how long the server may take to acknowledge a claim.
    """

    def __init__(
        self,
        make_client: Callable[[], ModelExpressClient],
        identity: p2p_pb2.SourceIdentity,
        facts: InstanceFacts,
        *,
        purpose: str = "files",
        renewal_s: float = RENEWAL_S,
        silence_s: float = SILENCE_S,
        ack_timeout_s: float = 10.0,
    ):
        self._make_client = make_client
        self._identity = p2p_pb2.SourceIdentity()
        self._identity.CopyFrom(identity)
        self._identity.extra_parameters[CLAIM_PARAMETER] = purpose
        self._facts = facts
        self._worker = p2p_pb2.WorkerMetadata(topology={FACTS_KEY: encode_facts(facts)})
        self._renewal_s = renewal_s
        self._silence_s = silence_s
        self._ack_timeout_s = ack_timeout_s
        self._ages = AgeTracker(wall_ms=None)
        self._publisher: Publisher | None = None
        self.held = False

    def try_acquire(self, client: ModelExpressClient) -> bool:
        """One attempt; whether this instance may read the files now. Call it again after a moment if not.

        Raises:
            ModelExpressError: if the server cannot be reached, or does not take the claim: then it would not take
                anybody's, and who waits for another's claim waits for nobody.
        """
        if self.held:
            return True
        if self._publisher is None:
            if self._claims_of_others(client, ""):
                return False
            publisher = Publisher(
                self._make_client(), self._identity, self._worker, heartbeat_interval_s=self._renewal_s
            )
            publisher.start()
            self._publisher = publisher
            if not self._is_taken(publisher):
                reason = publisher.stats().last_error or "the server does not acknowledge it"
                self.release()
                self._claims_of_others(client, "")  # fails if the server has gone, so that its outage counts from here
                raise ModelExpressError("the claim to read the files", client.address, NOT_TAKEN, reason)
        others = self._claims_of_others(client, self._publisher.worker_id)
        if any(worker_id < self._publisher.worker_id for worker_id in others):
            self.release()
            return False
        self.held = not others
        return self.held

    def _is_taken(self, publisher: Publisher) -> bool:
        """Whether the server takes the claim; it is given less time where it says that it does not."""
        first_s = min(self._ack_timeout_s, REFUSAL_S)
        if publisher.set_status(INITIALIZING, first_s):
            return True
        if REFUSED in publisher.stats().last_error:
            return False
        return publisher.set_status(INITIALIZING, self._ack_timeout_s - first_s)

    def release(self) -> None:
        """Take the claim down. Idempotent."""
        self.held = False
        if self._publisher is not None:
            self._publisher.close()
            self._publisher = None

    def _claims_of_others(self, client: ModelExpressClient, own_id: str) -> list[str]:
        """Worker ids of the other instances whose claims are up and alive."""
        living = []
        refs = client.list_sources(self._identity, status=INITIALIZING)
        if own_id and all(ref.worker_id != own_id for ref in refs):
            logger.warning(
                "the ModelExpress server %s has taken this instance's claim to read the files, but does not list it: "
                "others may read them too",
                client.address,
            )
        for ref in refs:
            if ref.worker_id == own_id or self._is_predecessor(ref):
                continue
            updated_at = ref.updated_at or client.get_metadata(ref.mx_source_id, ref.worker_id).worker.updated_at
            if self._ages.age_s(ref.mx_source_id, ref.worker_id, 0, updated_at) <= self._silence_s:
                living.append(ref.worker_id)
        return living

    def _is_predecessor(self, ref: p2p_pb2.SourceInstanceRef) -> bool:
        """Whether the claim is that of an instance that ran at this one's address and has crashed."""
        own, other = self._facts, read_facts(ref.topology)
        if other is None or not own.instance or own.started_at == other.started_at:
            return False
        return (own.instance, own.host) == (other.instance, other.host)
