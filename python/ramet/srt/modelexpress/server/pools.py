"""Owns which standby shall become what, so that there are as many instances of a model as an operator wants.

Knows no clock and no network. All is in memory: a server that has forgotten what is wanted leaves all as it is, and
learns from standbys how they have become what they serve.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass

from ramet.srt.weights.pool import (
    NOTHING,
    PoolState,
    ScaleState,
    SetScale,
    StandbyOrder,
    StandbyReport,
    StandbyState,
    recipe_of,
)

LEASE_S = 10.0  # a standby that has not reported for so long is not counted any more
FAILED_PAUSE_S = 30.0  # before a standby that could not become something is asked again
MIN_PAUSE_S = 1.0
REPORTS_PER_S = 200
MAX_STANDBYS = 20_000
MAX_MODELS = 1000

Instances = Callable[[str], Collection[str]]  # URLs of all instances of a model that report as such


@dataclass
class _Order:
    number: int
    model: str  # "": none
    become: str


@dataclass
class _Standby:
    report: StandbyReport
    seen_at: float
    order: _Order | None = None
    failed_at: float | None = None
    became: tuple[str, str] = ("", "")  # its model's own name, and that by which it was ordered

    def serves(self, model: str) -> bool:
        """Whether it serves a model, by either name, and nothing else is ordered."""
        own = self.report.model
        return self.order is None and (own == model or bool(own) and self.became == (own, model))


class Pools:
    """All standbys, and what is wanted of them.

    Args:
        instances: of a model, started in whatever way.
        number: of the first order; they rise.
    """

    def __init__(self, instances: Instances, number: int):
        self._instances = instances
        self._number = number
        self._standbys: dict[str, _Standby] = {}
        self._wanted: dict[str, int] = {}
        self._recipes: dict[str, str] = {}  # by model: how standbys become it
        self._errors: dict[str, str] = {}

    def scale(self, wanted: SetScale, now: float) -> ScaleState:
        """Have another number of instances from now on.

        Raises:
            ValueError: if there are too many models.
        """
        if wanted.model not in self._wanted and len(self._wanted) >= MAX_MODELS:
            raise ValueError(f"a number of instances is wanted of {MAX_MODELS} models already")
        if wanted.become is not None:
            self._recipes[wanted.model] = recipe_of(wanted.become)
        self._errors.pop(wanted.model, None)
        for one in self._standbys.values():
            one.failed_at = None
        if wanted.instances is None:
            self._wanted.pop(wanted.model, None)
        else:
            self._wanted[wanted.model] = wanted.instances
        self._forget_the_dead(now)
        self._give_orders(now)
        return self._state_of(wanted.model)

    def report(self, report: StandbyReport, now: float) -> StandbyOrder:
        """Take a report in; what the standby shall do.

        Raises:
            ValueError: if there are too many standbys.
        """
        self._forget_the_dead(now)
        known = self._standbys.get(report.instance)
        if known is None or known.report.started_at != report.started_at:
            if known is None and len(self._standbys) >= MAX_STANDBYS:
                raise ValueError(f"{MAX_STANDBYS} standbys report already")
            known = self._standbys[report.instance] = _Standby(report, now)
        known.report, known.seen_at = report, now
        if report.model and report.recipe:
            self._recipes.setdefault(report.model, report.recipe)
        if known.order is not None and report.done_number == known.order.number:
            self._note_done(known, known.order, now)
        self._give_orders(now)
        pause_s = max(MIN_PAUSE_S, len(self._standbys) / REPORTS_PER_S)
        if known.order is None:
            return StandbyOrder(pause_s=pause_s)
        return StandbyOrder(number=known.order.number, become=known.order.become, pause_s=pause_s)

    def state(self, now: float) -> PoolState:
        """For people."""
        self._forget_the_dead(now)
        models = {one.report.model for one in self._standbys.values()} | set(self._wanted)
        return PoolState(
            standbys=[
                StandbyState(
                    instance=one.report.instance,
                    state="becoming" if one.order is not None else one.report.state,
                    model=one.report.model,
                    is_warm=one.report.is_warm,
                    kept=one.report.kept,
                    error=one.report.error,
                )
                for _, one in sorted(self._standbys.items())
            ],
            models=[self._state_of(model) for model in sorted(models - {""})],
        )

    def _state_of(self, model: str) -> ScaleState:
        return ScaleState(
            model=model,
            wanted=self._wanted.get(model),
            serving=sorted(self._serving(model)),
            becoming=sorted(one.report.instance for one in self._ordered(model)),
            error=self._errors.get(model, ""),
        )

    def _serving(self, model: str) -> set[str]:
        """What a standby serves, it says itself; what its model's fleet still counts may be of yesterday."""
        others = {url for url in self._instances(model) if url not in self._standbys}
        return others | {url for url, one in self._standbys.items() if one.serves(model)}

    def _ordered(self, model: str) -> list[_Standby]:
        return [one for one in self._standbys.values() if one.order is not None and one.order.model == model]

    def _note_done(self, standby: _Standby, order: _Order, now: float) -> None:
        standby.order = None
        if standby.report.error:
            standby.failed_at = now
            self._errors[order.model] = f"{standby.report.instance}: {standby.report.error}"
        else:
            standby.became = (standby.report.model, order.model)
            self._errors.pop(order.model, None)

    def _give_orders(self, now: float) -> None:
        for model, wanted in self._wanted.items():
            lacking = wanted - len(self._serving(model)) - len(self._ordered(model))
            if lacking > 0:
                recipe = self._recipes.get(model) or recipe_of({"model_path": model})
                for standby in self._free(model, now)[:lacking]:
                    self._order(standby, model, recipe)
            elif lacking < 0:
                # What an operator has started by itself is nobody's to stop.
                own = [one for one in self._standbys.values() if one.serves(model)]
                own.sort(key=lambda one: -one.report.started_at)
                for standby in own[:-lacking]:
                    self._order(standby, "", NOTHING)

    def _free(self, model: str, now: float) -> list[_Standby]:
        """Those that can become a model, and first those that have been it."""
        free = [
            one
            for one in self._standbys.values()
            if one.order is None
            and one.report.state == "standby"
            and (one.report.is_warm or model in one.report.kept)
            and (one.failed_at is None or now - one.failed_at > FAILED_PAUSE_S)
        ]
        return sorted(free, key=lambda one: (model not in one.report.kept, one.report.instance))

    def _order(self, standby: _Standby, model: str, become: str) -> None:
        self._number += 1
        standby.order = _Order(self._number, model, become)

    def _forget_the_dead(self, now: float) -> None:
        for url in [url for url, one in self._standbys.items() if now - one.seen_at > LEASE_S]:
            del self._standbys[url]
