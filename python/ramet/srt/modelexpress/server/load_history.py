"""Owns who took weights from whom and when, also of instances that have gone and of weights that were replaced."""

import time
from collections import OrderedDict
from itertools import islice, zip_longest

import msgspec

from ramet.srt.modelexpress.records import InstanceFacts, encode_facts

MAX_LOADS = 20_000
MAX_WORKERS = 50_000
MAX_NAME_LEN = (
    1024  # of a worker's id and its instance; what is longer is not remembered: strangers could fill the memory
)
MAX_FACTS_LEN = 4096  # of what a record says of an instance, likewise
MAX_CLOCK_ERROR_S = 86_400.0  # what ends later than that by this server's clock is no time, and would stretch the axis


class Giver(msgspec.Struct, kw_only=True):
    """A worker that gave weights. `instance` is "" where nobody knows it any more."""

    worker_id: str
    instance: str
    worker_rank: int | None
    num_bytes: int | None  # that it gave, where that was said


class Taking(msgspec.Struct, kw_only=True):
    """How a worker came to its weights."""

    source: str
    num_bytes: int
    seconds: float
    gb_per_s: float | None
    verified: bool
    taken_from: list[Giver]
    fallback_reason: str


class Load(msgspec.Struct, kw_only=True):
    """One rank has come to its weights."""

    model_name: str
    instance: str
    worker_rank: int
    ended_at: float  # unix seconds, by the clock of the instance
    weight_version: str
    taking: Taking


class LoadHistory:
    """The last loads that this server has heard of, in its memory. A record has its worker's last one only."""

    def __init__(self) -> None:
        self._loads: OrderedDict[tuple[str, int, float], tuple[str, InstanceFacts]] = OrderedDict()  # as they came
        self._workers: OrderedDict[str, tuple[str, int]] = OrderedDict()  # -> the instance and the rank
        self._forgotten_until = 0.0  # loads that ended up to then may have been let go, and are not taken again
        self.num_noted = 0  # ever: whoever has seen this many has seen all

    def note(self, model_name: str, worker_id: str, worker_rank: int, facts: InstanceFacts | None) -> None:
        """Remember a worker, and how it came to its weights if its record says when. What is known costs nothing."""
        name = facts.instance if facts else worker_id
        if worker_id not in self._workers and len(worker_id) + len(name) <= MAX_NAME_LEN:
            self._workers[worker_id] = (name, worker_rank)
            if len(self._workers) > MAX_WORKERS:
                self._workers.popitem(last=False)
        if facts is None or facts.load is None:
            return
        key = (worker_id, worker_rank, facts.loaded_at)
        if key in self._loads or not self._forgotten_until < facts.loaded_at < time.time() + MAX_CLOCK_ERROR_S:
            return
        if len(encode_facts(facts)) <= MAX_FACTS_LEN:
            self._loads[key] = (model_name, facts)
            self.num_noted += 1
            if len(self._loads) > MAX_LOADS:
                _, (_, oldest) = self._loads.popitem(last=False)
                self._forgotten_until = max(self._forgotten_until, oldest.loaded_at)

    def loads(self, after: int = 0) -> list[Load]:
        """What is remembered of the loads that were noted after the first `after`, by the time at which they ended."""
        num_new = max(0, self.num_noted - after)
        found = [
            Load(
                model_name=model_name,
                instance=facts.instance,
                worker_rank=worker_rank,
                ended_at=facts.loaded_at,
                weight_version=facts.weight_version,
                taking=taking,
            )
            for (_, worker_rank, _), (model_name, facts) in islice(reversed(self._loads.items()), num_new)
            if (taking := self.taking(facts)) is not None
        ]
        return sorted(found, key=lambda load: load.ended_at)

    def taking(self, facts: InstanceFacts | None) -> Taking | None:
        """How the worker with these facts came to its weights; None if they don't say."""
        if facts is None or facts.load is None:
            return None
        load, givers = facts.load, []
        for worker_id, num_bytes in zip_longest(load.taken_from, load.taken_bytes[: len(load.taken_from)]):
            name, rank = self._workers.get(worker_id, ("", None))
            givers.append(Giver(worker_id=worker_id, instance=name, worker_rank=rank, num_bytes=num_bytes))
        return Taking(
            source=load.source,
            num_bytes=load.num_bytes,
            seconds=load.seconds,
            gb_per_s=load.num_bytes / load.seconds / 1e9 if load.seconds > 0 else None,
            verified=load.verified,
            taken_from=givers,
            fallback_reason=load.fallback_reason,
        )
