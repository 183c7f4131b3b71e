"""Owns what standbys and the metadata server that knows them say to each other. Pure data.

How many instances of a model there shall be is an operator's word; which standby becomes one, the server's.
"""

from typing import Annotated, Any

import msgspec

from ramet.srt.utils.outside_json import Natural, decode_json
from ramet.srt.weights.fleet import Name

MAX_INSTANCES = 10_000
MAX_RECIPE_LEN = 16_384
MAX_KEPT = 128

Recipe = Annotated[str, msgspec.Meta(max_length=MAX_RECIPE_LEN)]  # a body of /become, as JSON; "": none


class StandbyReport(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a standby says of itself, about every second, whether a model serves or not."""

    instance: Name  # its URL
    started_at: float
    state: Name  # "warming", "standby", "becoming", "serving"
    model: Name = ""  # that serves, by which its fleet goes
    recipe: Recipe = ""  # by which it has become that
    is_warm: bool = False  # processes wait for a model
    kept: Annotated[list[Name], msgspec.Meta(max_length=MAX_KEPT)] = []
    done_number: Natural = 0  # of the last order that it has carried out, or could not
    error: Name = ""  # why it could not


class StandbyOrder(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What it is answered."""

    number: Natural = 0  # 0: no order
    become: Recipe = ""
    pause_s: float = 1.0  # until it shall report again


class SetScale(msgspec.Struct, frozen=True, kw_only=True):
    """What an operator says."""

    model: Name
    instances: Annotated[int, msgspec.Meta(ge=0, le=MAX_INSTANCES)] | None  # None: as many as there happen to be
    become: dict[str, Any] | None = None  # a body of /become; None: as an instance has become it, or the model's name


class ScaleState(msgspec.Struct, frozen=True, kw_only=True):
    """How far one model is."""

    model: str
    wanted: int | None
    serving: list[str]  # URLs
    becoming: list[str]
    error: str  # of the last standby that could not become it; "" since one has


class StandbyState(msgspec.Struct, frozen=True, kw_only=True):
    """One standby, as an operator sees it."""

    instance: str
    state: str
    model: str
    is_warm: bool
    kept: list[str]
    error: str


class PoolState(msgspec.Struct, frozen=True, kw_only=True):
    """All standbys, and the models of which a number of instances is wanted, or that standbys serve."""

    standbys: list[StandbyState]
    models: list[ScaleState]


def read_standby_report(data: bytes) -> StandbyReport:
    """Raises ValueError if it is none."""
    report = decode_json(data, StandbyReport)
    if not report.instance:
        raise ValueError("a report names its instance")
    return report


def read_set_scale(data: bytes) -> SetScale:
    """Raises ValueError if it is none."""
    wanted = decode_json(data, SetScale)
    if not wanted.model:
        raise ValueError("model is empty")
    if wanted.become is not None:
        if not isinstance(wanted.become.get("model_path"), str):
            raise ValueError("become names no model_path")
        if len(recipe_of(wanted.become)) > MAX_RECIPE_LEN:
            raise ValueError(f"become has more than {MAX_RECIPE_LEN} characters")
    return wanted


def recipe_of(body: dict[str, Any]) -> str:
    """A body of /become as text."""
    return msgspec.json.encode(body).decode()


NOTHING = recipe_of({"model_path": None})
