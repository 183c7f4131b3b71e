"""Owns what the scheduler of a replica must know of how its instance runs."""

import sys
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Made by ServerArgs.scheduler_config, which has validated the values and filled in the device's defaults."""

    max_running_requests: int  # that hold KV cache at a time
    max_queued_requests: int  # that may wait; further ones are refused
    page_size: int  # tokens
    chunked_prefill_size: int  # prompt tokens in one pass; -1: without limit
    target_itl_s: float  # seconds that a request should wait for its next token while prompts are computed; 0: any
    most_itl_s: float  # the same while many prompts wait
    schedule_policy: str  # "deadline", "lpm", "fcfs" or "priority"
    low_priority_values_first: bool  # whether a low value is a high priority
    disable_radix_cache: bool
    stream_interval: int  # output tokens between two outputs of a streamed request
    random_seed: int  # of the sampling seeds given to requests without one
    overlap: bool  # plan a pass before the tokens of the one before it are known
    decode_log_interval: int | None = None  # decode passes between two lines of the log; None: seconds count
    num_lora_slots: int = 0  # adapters that the requests of one pass may have

    @property
    def prefill_budget(self) -> int:
        """Prompt tokens that one pass may compute."""
        return sys.maxsize if self.chunked_prefill_size == -1 else self.chunked_prefill_size
