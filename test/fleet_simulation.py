"""A fleet with a clock and a network of its own: the code that instances and metadata servers run, in random orders."""

import heapq
import random
from collections.abc import Callable

from ramet.srt.managers.fleet_member import FleetMember
from ramet.srt.modelexpress.server.fleet_targets import ModelFleet
from ramet.srt.weights.fleet import FleetOrder, FleetReport, FleetTarget, SetTarget

MODEL = "m"
TAKE_S = (0.2, 3.0)


class SimulatedInstance:
    """One process: what it serves ("": it awaits its first weights), and its part in the fleet."""

    def __init__(self, fleet: "SimulatedFleet", name: str, version: str) -> None:
        self.fleet, self.name, self.version = fleet, name, version
        self.member = FleetMember(MODEL, name, fleet.now)
        self.is_alive = True
        self.said = 0  # the newest number with which it has said that it is ready
        self.tick()

    @property
    def is_ready(self) -> bool:
        return self.is_alive and bool(self.version) and self.member.obstacle(self.version) is None

    def look(self) -> None:
        """What a balancer does, and a request of a user's right after."""
        if self.is_ready:
            number = self.member.ready_number or 0
            assert number >= self.said, "it is ready with an older target than before"
            self.said = number
            if number:
                assert self.version in ("", self.fleet.versions[number]) or not self.fleet.versions[number]
        self.answer()

    def answer(self) -> None:
        """A request is answered: by nothing older than the instance has said that it is ready with."""
        later = {version for number, version in self.fleet.versions.items() if number >= self.said}
        assert not self.said or "" in later or self.version in later, (self.said, self.version, self.fleet.versions)

    def tick(self) -> None:
        """Report, and again in a second."""
        if not self.is_alive:
            return
        self.look()
        report = self.member.report(self.version, is_ready=bool(self.version))
        self.fleet.send(lambda: self.fleet.receive(report, self))
        self.fleet.at(self.fleet.chance.uniform(0.8, 1.2), self.tick)

    def hear(self, order: FleetOrder) -> None:
        if not self.is_alive:
            return
        target = self.member.take_order(order, self.version)
        self.look()
        if target is not None:
            self.fleet.at(self.fleet.chance.uniform(*TAKE_S), lambda: self.take(target))

    def take(self, target: FleetTarget) -> None:
        if not self.is_alive:
            return
        if self.fleet.can_take(target.version):
            self.version = target.version
            self.answer()
            self.fleet.at(self.fleet.chance.uniform(0.0, 0.5), lambda: self.note(target, ""))
        else:
            self.note(target, "its checksums differ")

    def note(self, target: FleetTarget, error: str) -> None:
        if self.is_alive:
            self.member.note_taken(target, self.version, error)
            self.look()


class SimulatedFleet:
    """A metadata server, instances, and time."""

    def __init__(self, seed: int, *, loss: float = 0.0, max_delay_s: float = 0.05) -> None:
        self.chance = random.Random(seed)
        self.loss, self.max_delay_s = loss, max_delay_s
        self.now = 100.0
        self.server = ModelFleet(0.0)
        self.is_away = False
        self.instances: list[SimulatedInstance] = []
        self.versions: dict[int, str] = {}  # of all targets that there ever were, by their numbers
        self.bad: set[str] = set()
        self.check: Callable[[], None] = lambda: None
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._num_events = 0

    def at(self, delay_s: float, what: Callable[[], None]) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (self.now + delay_s, self._num_events, what))

    def send(self, what: Callable[[], None]) -> None:
        """Over the network."""
        if self.chance.random() >= self.loss:
            self.at(self.chance.uniform(0.0, self.max_delay_s), what)

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self._events and self._events[0][0] <= end:
            self.now, _, what = heapq.heappop(self._events)
            what()
            self.check()
        self.now = end

    def receive(self, report: FleetReport, sender: SimulatedInstance) -> None:
        if self.is_away:
            return
        order = self.server.report(report, self.now)
        self._note_target()
        self.send(lambda: sender.hear(order))

    def _note_target(self) -> None:
        target = self.server.target
        if target is not None:
            assert self.versions.setdefault(target.number, target.version) == target.version, "a number is used twice"

    def set(self, version: str, min_serving: float = 0.75) -> None:
        wanted = SetTarget(model=MODEL, version=version, min_serving=min_serving)
        self.server.set(wanted, self.now, int(self.now * 1000))
        self._note_target()

    def can_take(self, version: str) -> bool:
        return version not in self.bad

    def join(self, version: str) -> SimulatedInstance:
        self.instances.append(SimulatedInstance(self, f"i{len(self.instances)}", version))
        return self.instances[-1]

    def leave(self, instance: SimulatedInstance) -> None:
        instance.is_alive = False

    def forget(self) -> None:
        """The server is started again, with nothing in its memory."""
        self.server = ModelFleet(self.now)

    @property
    def living(self) -> list[SimulatedInstance]:
        return [one for one in self.instances if one.is_alive]
