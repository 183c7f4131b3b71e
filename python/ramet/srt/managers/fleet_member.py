"""Owns what one instance knows of its fleet's target, and whether it may say that it is ready. Knows no clock.

Numbers of targets say which is older. An instance says that it is ready with one, and from then on it is ready with no
older one: so whoever asks it when it says so is answered by that version, or by a target that came later.
"""

import msgspec

from ramet.srt.weights.fleet import MAX_NAME_LEN, FleetOrder, FleetReport, FleetTarget

UNHEARD = "the metadata server has not said yet which version this instance shall serve"


class FleetMember:
    """One instance's part in its fleet.

    Args:
        model: by which the fleet goes.
        instance: the instance's URL.
        started_at: unix seconds.
    """

    def __init__(self, model: str, instance: str, started_at: float) -> None:
        self._model, self._instance, self._started_at = model, instance, started_at
        self.known: FleetTarget | None = None
        self.ready_number: int | None = None  # of the target with which it was ready last; None: it never was
        self._ready_version = ""  # that it serves then; "": whatever it is
        self.is_taking = False
        self._failed_number = 0
        self._error = ""

    def obstacle(self, weight_version: str) -> str | None:
        """Why the instance is not ready now, as it serves that version; None if nothing here speaks against it."""
        wanted = "" if self.known is None else self.known.version
        if self.is_taking:
            return f"the instance takes the version {wanted!r}"
        if self.ready_number is None:
            return f"the fleet's version is {wanted!r}, not {weight_version!r}" if wanted else UNHEARD
        if self._ready_version not in ("", weight_version):
            return f"the fleet's version is {wanted!r}, not {weight_version!r}"
        return None

    def report(self, weight_version: str, *, is_ready: bool) -> FleetReport:
        """What to tell the server.

        Args:
            is_ready: whether anything else speaks against it.
        """
        return FleetReport(
            model=self._model,
            instance=self._instance,
            started_at=self._started_at,
            weight_version=weight_version,
            is_ready=is_ready and self.obstacle(weight_version) is None,
            ready_number=self.ready_number or 0,
            is_taking=self.is_taking,
            failed_number=self._failed_number,
            error=self._error,
            known=self.known,
        )

    def take_order(self, order: FleetOrder, weight_version: str) -> FleetTarget | None:
        """Hear the server's answer; the target to take now, if it is this instance's turn."""
        target = order.target
        if target is None:
            if self.known is None and self.ready_number is None:
                self.ready_number = 0
            return None
        if self.known is not None and target.number < self.known.number:
            return None  # late, or of a server that has forgotten
        self.known = target
        if self.is_taking:
            return None
        if target.version in ("", weight_version):
            self._be_ready(target)
            return None
        if order.takes:
            self.is_taking = True
            return target
        return None

    def go_alone(self) -> None:
        """There is no server that knows of fleets, or it has been silent for so long that serving comes first."""
        if self.known is None and self.ready_number is None:
            self.ready_number = 0

    def note_taken(self, target: FleetTarget, weight_version: str, error: str = "") -> None:
        """The attempt to take a target has ended.

        Args:
            weight_version: that serves now.
            error: why it has failed; "" if it hasn't.
        """
        self.is_taking = False
        if error:
            self._failed_number, self._error = target.number, error[:MAX_NAME_LEN]
        elif self.known is not None and self.known.number == target.number and weight_version == target.version:
            self._be_ready(target)

    def _be_ready(self, target: FleetTarget) -> None:
        self.ready_number, self._ready_version = target.number, target.version
        if self._failed_number != target.number:
            self._failed_number, self._error = 0, ""


def encode(message: msgspec.Struct) -> bytes:
    """As it goes to the server."""
    return msgspec.json.encode(message)
