"""Owns how long planning can wait: what arrives while a pass is computed should be in the very next one.

A pass that is planned when the one before it has only begun is too early for what arrives then: that waits for both. So
planning waits until shortly before the end of the pass under way, which is estimated from passes of its kind. The lead
covers what planning and launching take on this host. The device must never run dry for it: in doubt nothing waits.
"""

import math
from dataclasses import dataclass, field

MIN_SAMPLES = 3  # passes of a kind before their time is trusted
KINDS_PER_OCTAVE = 8  # sizes of passes that count as one kind: within a twelfth of each other
GAIN = 0.25  # of what is new in a running average
MIN_LEAD_S = 0.002
MAX_LEAD_SHARE = 0.5  # of a pass: where the lead takes more of it, next to nothing arrives in the rest
MIN_WAIT_S = 0.001  # what a socket can wait for
AT_ONCE_S = 0.0001  # a result that is there within this time was there when it was asked for
MAX_MARGIN = 8.0
MARGIN_DECAY = 0.98


class Estimate:
    """A running average, with the average distance of what is measured from it."""

    def __init__(self) -> None:
        self.num_samples = 0
        self._mean = self._deviation = 0.0

    def add(self, value: float) -> None:
        gain = max(GAIN, 1 / (self.num_samples + 1))
        self.num_samples += 1
        error = value - self._mean
        self._mean += gain * error
        if self.num_samples > 1:
            self._deviation += GAIN * (abs(error) - self._deviation)

    @property
    def low(self) -> float:
        """What few are below."""
        return self._mean - 2 * self._deviation

    @property
    def high(self) -> float:
        """What few are above."""
        return self._mean + 2 * self._deviation


@dataclass(slots=True)
class PassKind:
    """What passes of about the same size take, in seconds: on the device, and on the host to plan and to launch."""

    device: Estimate = field(default_factory=Estimate)
    host: Estimate = field(default_factory=Estimate)


class LatePlanning:
    """Learns from passes, and says how long the planning of the next one can wait.

    The end of a pass is seen where the host waits for its result. If the result is there at once when it is asked for,
    the pass has ended before, maybe before the next one was launched: then the lead grows, and nothing is learnt from
    its time, which was shorter. As the next pass has begun nobody knows when, nothing waits for its end.
    """

    def __init__(self) -> None:
        self._kinds: dict[tuple[bool, int], PassKind] = {}
        self._host = Estimate()
        self._margin = 1.0  # by which the lead is longer than it seems to have to be
        self._is_begin_known = False  # of the oldest pass under way
        self._has_waited = False  # with planning the next one, until late in it

    def spare_s(self, num_tokens: int, num_prompt_tokens: int, elapsed_s: float) -> float:
        """Seconds for which planning can wait; 0.0 if it is time.

        Args:
            num_tokens: of the only pass under way.
            num_prompt_tokens: those of them that are parts of prompts.
            elapsed_s: since it has begun.
        """
        kind = self._kind(num_tokens, num_prompt_tokens)
        if not self._is_begin_known or kind.device.num_samples < MIN_SAMPLES:
            return 0.0
        end_s = kind.device.low
        # Often the next pass is of the same kind; large ones take the host long, as no graph holds them.
        lead_s = self._margin * max(MIN_LEAD_S, self._host.high, kind.host.high)
        spare_s = end_s - lead_s - elapsed_s
        if lead_s > MAX_LEAD_SHARE * end_s or spare_s < MIN_WAIT_S:
            return 0.0
        self._has_waited = True
        return spare_s

    def launched(self, num_tokens: int, num_prompt_tokens: int, host_s: float | None, is_first: bool) -> None:
        """A pass has been launched.

        Args:
            host_s: what it took to plan and to launch it; None if the host has waited for something meanwhile.
            is_first: no other was under way, so that it has begun at once.
        """
        if host_s is not None:
            self._host.add(host_s)
            self._kind(num_tokens, num_prompt_tokens).host.add(host_s)
        if is_first:
            self._is_begin_known = True

    def came_back(self, num_tokens: int, num_prompt_tokens: int, seconds: float, waited_s: float) -> None:
        """The oldest pass has ended.

        Args:
            seconds: that it took, as far as is known.
            waited_s: from when its result was asked for until it was there.
        """
        is_late = waited_s < AT_ONCE_S
        if self._is_begin_known and not is_late:
            self._kind(num_tokens, num_prompt_tokens).device.add(seconds)
        if self._has_waited:
            self._margin = min(MAX_MARGIN, 2 * self._margin) if is_late else max(1.0, MARGIN_DECAY * self._margin)
        self._is_begin_known = not is_late
        self._has_waited = False

    def _kind(self, num_tokens: int, num_prompt_tokens: int) -> PassKind:
        size = round(KINDS_PER_OCTAVE * math.log2(max(1, num_tokens)))
        return self._kinds.setdefault((num_prompt_tokens > 0, size), PassKind())
