"""When the line about a replica is due, and what it says."""

import logging
from types import SimpleNamespace
from typing import Any

from ramet.srt.managers.io_struct import GetInternalStateReqOutput
from ramet.srt.managers.load_log import PERIOD_S, LoadLog

STATE = GetInternalStateReqOutput(
    request_id="", num_running_reqs=3, num_waiting_reqs=2, num_used_tokens=50, num_cached_tokens=20,
    max_total_num_tokens=200, num_retracted_reqs=0, last_gen_throughput=0.0,
)  # fmt: skip
DECODE: Any = SimpleNamespace(decoding=[1], num_prompt_tokens=0)
PROMPT: Any = SimpleNamespace(decoding=[], num_prompt_tokens=30)


class Clock:
    now = 100.0
    num_tokens = 7

    def log(self, interval: int | None) -> LoadLog:
        return LoadLog(interval, lambda: STATE, lambda: self.num_tokens, lambda: self.now)


def test_every_few_seconds_in_which_something_runs(lines: list[logging.LogRecord]) -> None:
    clock = Clock()
    log = clock.log(None)
    log.note(None)
    clock.now += 1000
    log.note(PROMPT)
    clock.now, clock.num_tokens = clock.now + PERIOD_S - 0.1, 17
    log.note(DECODE)
    assert not lines
    clock.now += 0.1
    log.note(None)  # nothing runs any more: what has run is still told
    assert lines[0].getMessage() == (
        "#running-req: 3, #queue-req: 2, gen throughput (token/s): 2.00, input throughput (token/s): 6.00, "
        "#token: 50, token usage: 0.25, #prefix-cache-token: 20"
    )
    assert lines[0].fields["passes"] == 2
    clock.now += 1000
    log.note(None)
    assert len(lines) == 1, "and nothing is told of nothing"


def test_after_so_many_decode_passes(lines: list[logging.LogRecord]) -> None:
    clock = Clock()
    log = clock.log(3)
    for batch in (DECODE, PROMPT, None, DECODE):
        clock.now += PERIOD_S
        log.note(batch)
    assert not lines
    for _ in range(4):
        log.note(DECODE)
    assert len(lines) == 2
