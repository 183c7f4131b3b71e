"""Owns which version the instances of a model shall serve, and whose turn it is to take it. Knows no clock, no network.

All is in memory. A server that has forgotten it learns the target from the instances, and waits until all that live
have reported before it lets one take anything.
"""

import math
from collections import Counter
from dataclasses import dataclass

from ramet.srt.weights.fleet import (
    MAX_NAME_LEN,
    FleetMemberState,
    FleetOrder,
    FleetReport,
    FleetState,
    FleetTarget,
    SetTarget,
)

LEASE_PAUSES = 10  # an instance that has not reported for so many pauses is not counted any more
MIN_PAUSE_S = 1.0
REPORTS_PER_S = 200  # of all instances of a model
MAX_MEMBERS = 20_000  # of all models
MAX_MODELS = 1000


@dataclass
class _Member:
    report: FleetReport
    seen_at: float


class ModelFleet:
    """The instances of one model, and their target."""

    def __init__(self, opened_at: float) -> None:
        """
        Args:
            opened_at: since when reports can have come, in seconds of the clock of `report`.
        """
        self.target: FleetTarget | None = None
        self.members: dict[str, _Member] = {}
        self._opened_at = opened_at
        self._granted: set[str] = set()  # instances whose turn it is
        self._is_proven = False  # some instance serves the target

    def set(self, wanted: SetTarget, now: float, wall_ms: int) -> FleetTarget:
        """Have another target from now on.

        Args:
            wall_ms: unix milliseconds: numbers rise even over a server that has forgotten them.
        """
        previous = self._way_back(now)
        self._replace(
            FleetTarget(
                number=self._next_number(wall_ms),
                version=wanted.version,
                previous="" if previous == wanted.version else previous,
                min_serving=wanted.min_serving,
            )
        )
        assert self.target is not None
        return self.target

    def report(self, report: FleetReport, now: float) -> FleetOrder:
        """Take a report in; what the instance shall do."""
        known = report.known
        if known is not None and (self.target is None or known.number > self.target.number):
            self._replace(known)
        before = self.members.get(report.instance)
        if before is not None and before.report.started_at != report.started_at:
            self._granted.discard(report.instance)
        self.members[report.instance] = _Member(report, now)
        self._forget_the_dead(now)
        if self.target is not None and report.failed_number == self.target.number:
            self._go_back(report)
        return FleetOrder(target=self.target, takes=self._takes(report, now), pause_s=self.pause_s)

    @property
    def pause_s(self) -> float:
        """Between two reports of an instance."""
        return max(MIN_PAUSE_S, len(self.members) / REPORTS_PER_S)

    def state(self, model: str) -> FleetState:
        """For people."""
        number = 0 if self.target is None else self.target.number
        members = [
            FleetMemberState(
                instance=one.instance,
                weight_version=one.weight_version,
                is_ready=one.is_ready,
                is_taking=one.is_taking or one.instance in self._granted,
                serves_target=number > 0 and one.ready_number == number,
                error=one.error,
            )
            for one in (member.report for member in self.members.values())
        ]
        return FleetState(model=model, target=self.target, members=sorted(members, key=lambda one: one.instance))

    def _takes(self, report: FleetReport, now: float) -> bool:
        target = self.target
        if target is None or not target.version:
            return False
        self._is_proven |= report.ready_number == target.number
        if report.weight_version == target.version and not report.is_taking:
            self._granted.discard(report.instance)
            return False
        if report.is_taking:
            return False
        if report.instance in self._granted or self._may_go(report, now):
            self._granted.add(report.instance)
            return True
        return False

    def _may_go(self, report: FleetReport, now: float) -> bool:
        if now - self._opened_at < self._lease_s:
            return False  # others may be at it of whom nothing has been heard yet
        others = [member.report for name, member in self.members.items() if name != report.instance]
        out = [one for one in others if one.is_taking or one.instance in self._granted]
        if not self._is_proven:
            return not out  # the first goes alone
        if not report.is_ready:
            return True
        num_serving = 1 + sum(one.is_ready and one not in out for one in others)
        assert self.target is not None
        needed = math.ceil(self.target.min_serving * len(self.members))
        # A fleet too small for the share changes one by one, but never its last one that serves.
        return num_serving > needed or not out and (num_serving > 1 or not others)

    def _go_back(self, report: FleetReport) -> None:
        """An instance could not take the target: all go back to what was before, if there was something."""
        failed = self.target
        assert failed is not None
        if not failed.previous:
            return  # it tries again
        reason = f"{report.instance}: {report.error}"[:MAX_NAME_LEN]
        self._replace(
            FleetTarget(
                number=failed.number + 1,
                version=failed.previous,
                min_serving=failed.min_serving,
                failed=failed.version,
                reason=reason,
            )
        )

    def _replace(self, target: FleetTarget) -> None:
        self.target = target
        self._granted.clear()
        self._is_proven = any(one.report.ready_number == target.number for one in self.members.values())

    def _way_back(self, now: float) -> str:
        """What to go back to if the next target fails: what most serve, where no target has been reached.

        "" if there is nothing, as in a fleet that awaits its first weights: it tries again.
        """
        if self.target is not None and self.target.version:
            return self.target.version if self._is_proven else self.target.previous
        self._forget_the_dead(now)
        versions = (member.report.weight_version for member in self.members.values())
        served = Counter(version for version in versions if version)
        return served.most_common(1)[0][0] if served else ""

    def _next_number(self, wall_ms: int) -> int:
        return max(wall_ms, 0 if self.target is None else self.target.number + 1)

    @property
    def _lease_s(self) -> float:
        return LEASE_PAUSES * self.pause_s

    def _forget_the_dead(self, now: float) -> None:
        dead = [name for name, member in self.members.items() if now - member.seen_at > self._lease_s]
        for name in dead:
            del self.members[name]
            self._granted.discard(name)


class FleetTargets:
    """The fleets of all models."""

    def __init__(self, opened_at: float) -> None:
        self._opened_at = opened_at
        self._fleets: dict[str, ModelFleet] = {}

    def set(self, wanted: SetTarget, now: float, wall_ms: int) -> FleetTarget:
        """See ModelFleet. Raises ValueError if there are too many models."""
        return self._fleet(wanted.model).set(wanted, now, wall_ms)

    def report(self, report: FleetReport, now: float) -> FleetOrder:
        """See ModelFleet. Raises ValueError if there are too many models or instances."""
        fleet = self._fleet(report.model)
        if (
            report.instance not in fleet.members
            and sum(len(one.members) for one in self._fleets.values()) >= MAX_MEMBERS
        ):
            raise ValueError(f"{MAX_MEMBERS} instances report already")
        return fleet.report(report, now)

    def instances(self, model: str) -> list[str]:
        """URLs of the instances of a model that have reported lately."""
        fleet = self._fleets.get(model)
        return [] if fleet is None else list(fleet.members)

    def states(self) -> list[FleetState]:
        """Of all models, by their names."""
        return [fleet.state(name) for name, fleet in sorted(self._fleets.items())]

    def describe(self, model: str) -> str:
        """The target of a model in a few words; "" if there is none."""
        if model not in self._fleets:
            return ""
        state = self._fleets[model].state(model)
        if state.target is None or not state.target.version:
            return ""
        num_there = sum(one.serves_target for one in state.members)
        back = f", {state.target.failed} failed" if state.target.failed else ""
        return f"{state.target.version} ({num_there} of {len(state.members)}{back})"

    def _fleet(self, model: str) -> ModelFleet:
        if model not in self._fleets and len(self._fleets) >= MAX_MODELS:
            empty = [name for name, fleet in self._fleets.items() if not fleet.members and fleet.target is None]
            if not empty:
                raise ValueError(f"{MAX_MODELS} models have fleets already")
            del self._fleets[empty[0]]
        return self._fleets.setdefault(model, ModelFleet(self._opened_at))
