"""Owns how large a rank's KV cache is: pages that fit beside the weights, equal on all ranks of a replica."""

from dataclasses import dataclass

import torch

from ramet.srt.configs.model_config import ModelConfig
from ramet.srt.configs.runner_config import RunnerConfig
from ramet.srt.distributed.parallel_state import min_over_replica
from ramet.srt.mem_cache.kv_sizes import KVLayers, most_pages, window_pages
from ramet.srt.mem_cache.window_pages import WindowCapacity

LEAST_PASS = 128  # prompt tokens that a pass on a GPU may have, whatever its limit; see TokenBudget


@dataclass(frozen=True)
class KVCachePlan:
    """The pages of a KV cache, and what layers keep that have a window of their own."""

    num_pages: int
    windows: WindowCapacity | None = None  # None: all layers keep everything
    window_layers: frozenset[int] = frozenset()  # ids of those that keep less
    num_state_slots: int = 0  # of linear layers; 0: there are none


STATES_PER_REQUEST = 2  # that may run: its own, and one for cached prefixes
MORE_STATES = 16  # for these, where few requests may run


def plan_kv_cache(
    config: RunnerConfig,
    model_config: ModelConfig,
    layers: KVLayers,
    device: torch.device,
    free: int,
    weights: int,
    state_bytes: int = 0,
) -> KVCachePlan:
    """The cache that a rank makes.

    Args:
        state_bytes: that this rank's linear layers keep of a sequence.
        free: bytes of memory before the weights come.
        weights: their bytes.

    Raises:
        ValueError: if the memory does not suffice, or for one request of useful length.
    """
    page_size = config.page_size
    num_states = _num_states(config, model_config, int(free * config.mem_fraction_static) - weights, state_bytes)
    all_states = (num_states + 1) * state_bytes
    window = _window_of_some(model_config) if layers.may_differ else None
    inside: frozenset[int] = frozenset()
    num_needed = 0
    if window is not None:
        inside = frozenset(index for index, one in enumerate(layers.windows) if one is not None)
        num_needed = _pages_in_use(config, window, LEAST_PASS if device.type == "cuda" else 0)
    full_bytes, window_bytes = layers.page_bytes(page_size, inside)
    if config.max_total_tokens is None:
        budget = int(free * config.mem_fraction_static) - weights - all_states
        wanted = config.max_running_requests * model_config.context_len // page_size
        fitting = most_pages(budget, full_bytes, window_bytes, num_needed)
        wanted = wanted if fitting is None else min(wanted, fitting)
    else:
        wanted = config.max_total_tokens // page_size
        num_bytes = wanted * full_bytes + window_pages(wanted, num_needed) * window_bytes
        if num_bytes + all_states > free - weights:
            states = f" and {all_states / 1e9:.2f} GB of states of linear layers" if all_states else ""
            raise ValueError(
                f"--max-total-tokens {config.max_total_tokens} needs {num_bytes / 1e9:.2f} GB of KV cache{states} "
                f"beside {weights / 1e9:.2f} GB of weights; {free / 1e9:.2f} GB are free on {device}"
            )
    num_pages = min_over_replica(wanted)
    if num_pages < 1:
        states = f", states of linear layers {all_states / 1e9:.2f} GB," if all_states else ""
        raise ValueError(
            f"no memory is left for the KV cache: {free / 1e9:.2f} GB were free on {device}, the weights take "
            f"{weights / 1e9:.2f} GB{states} of the {config.mem_fraction_static} that --mem-fraction-static allows (or "
            "--max-total-tokens is below --page-size)"
        )
    num_window_pages = window_pages(num_pages, num_needed)
    if window is None or num_window_pages == num_pages:
        return KVCachePlan(num_pages, num_state_slots=num_states)
    return KVCachePlan(num_pages, WindowCapacity(window, num_window_pages), inside, num_states)


def _num_states(config: RunnerConfig, model_config: ModelConfig, budget: int, state_bytes: int) -> int:
    """How many sequences' states are kept: equal on all ranks of a replica.

    Args:
        budget: bytes for them and the KV cache.
    """
    if model_config.traits.delta is None:
        if config.max_state_slots is not None:
            raise ValueError(
                f"--max-mamba-cache-size {config.max_state_slots} is for models with linear layers; "
                f"{model_config.architecture} has none"
            )
        return 0
    wanted = config.max_state_slots
    if wanted is None:
        wanted = STATES_PER_REQUEST * config.max_running_requests + MORE_STATES
        if state_bytes:
            wanted = min(wanted, max(1, budget // 2 // state_bytes - 1))
    return min_over_replica(wanted)


def _window_of_some(model_config: ModelConfig) -> int | None:
    """The window of a model that has one, in some of its layers alone."""
    windows = {layer.window for layer in model_config.layers}
    found = windows - {None}
    return found.pop() if len(found) == 1 and len(windows) == 2 else None


def _pages_in_use(config: RunnerConfig, window: int, least_pass: int) -> int:
    """The most that running requests see, and two passes compute; a request begins and ends within a page."""
    by_request = -(-window // config.page_size) + 4
    in_passes = 2 * max(least_pass, config.max_prefill_tokens)
    return config.max_running_requests * by_request + in_passes // config.page_size + 2
