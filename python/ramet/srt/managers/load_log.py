"""Owns the line about what a replica does: when it is due, and what it says."""

import logging
import time
from collections.abc import Callable

from ramet.srt.managers.io_struct import GetInternalStateReqOutput
from ramet.srt.managers.schedule_batch import ScheduleBatch

logger = logging.getLogger(__name__)

PERIOD_S = 5.0


class LoadLog:
    """Writes a line after so many decode passes, or else every few seconds in which passes are computed.

    Args:
        interval: decode passes from one line to the next; None: `PERIOD_S` counts.
        state: gives the scheduler's numbers.
        num_output_tokens: gives how many tokens have come out since the start.
        clock: gives the time in seconds.
    """

    def __init__(
        self,
        interval: int | None,
        state: Callable[[], GetInternalStateReqOutput],
        num_output_tokens: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
    ):
        self._interval = interval
        self._state = state
        self._num_output_tokens = num_output_tokens
        self._clock = clock
        self._num_passes = self._num_decodes = self._num_prompt_tokens = 0  # since the last line
        self._since = 0.0  # the first of these passes
        self._tokens_before = 0

    def note(self, batch: ScheduleBatch | None) -> None:
        """A turn of the loop is over, in which this pass was queued, or none."""
        if batch is not None:
            if not self._num_passes:
                self._since, self._tokens_before = self._clock(), self._num_output_tokens()
            self._num_passes += 1
            self._num_decodes += bool(batch.decoding)
            self._num_prompt_tokens += batch.num_prompt_tokens
        if self._num_passes and self._is_due():
            self._write()

    def _is_due(self) -> bool:
        if self._interval is not None:
            return self._num_decodes >= self._interval
        return self._clock() - self._since >= PERIOD_S

    def _write(self) -> None:
        state, seconds = self._state(), max(self._clock() - self._since, 1e-9)
        fields = {
            "running": state.num_running_reqs,
            "waiting": state.num_waiting_reqs,
            "gen_throughput": round((self._num_output_tokens() - self._tokens_before) / seconds, 2),
            "input_throughput": round(self._num_prompt_tokens / seconds, 2),
            "used_tokens": state.num_used_tokens,
            "prefix_cache_tokens": state.num_cached_tokens,
            "token_usage": round(state.num_used_tokens / max(1, state.max_total_num_tokens), 4),
            "passes": self._num_passes,
        }
        logger.info(
            "#running-req: %(running)d, #queue-req: %(waiting)d, gen throughput (token/s): %(gen_throughput).2f, "
            "input throughput (token/s): %(input_throughput).2f, #token: %(used_tokens)d, token usage: "
            "%(token_usage).2f, #prefix-cache-token: %(prefix_cache_tokens)d",
            fields,
            extra={"fields": fields},
        )
        self._num_passes = self._num_decodes = self._num_prompt_tokens = 0
