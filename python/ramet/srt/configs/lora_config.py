"""Owns what the ranks and the scheduler of a replica need to know of adapters."""

from dataclasses import dataclass

DEFAULT_MAX_LORAS = 8
DEFAULT_MAX_RANK = 16


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Made by ServerArgs.lora_config, of an instance that may have adapters."""

    max_loras_per_batch: int  # slots: adapters that requests of one pass may have
    max_lora_rank: int  # that an adapter may have, and every slot has room for
