"""Owns the states of a rank's linear layers: their pool, and what becomes of them around a pass."""

import logging

import torch
from torch import nn

from ramet.srt.batch.batch_plan import StateMoves
from ramet.srt.layers.attention.delta_passes import DeltaPasses
from ramet.srt.layers.attention.gated_delta import GatedDelta
from ramet.srt.mem_cache.memory_pool import ReqToPagePool
from ramet.srt.mem_cache.state_pool import StatePool

logger = logging.getLogger(__name__)


def state_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """What the linear layers of this rank's part of a model keep of one sequence."""
    return sum(layer.spec.num_bytes(dtype) for layer in linear_layers(model))


def linear_layers(model: nn.Module) -> list[GatedDelta]:
    """In the order of their places."""
    layers = [module for module in model.modules() if isinstance(module, GatedDelta)]
    return sorted(layers, key=lambda layer: layer.place)


class LinearStates:
    """Makes the pool, and has the layers of a model keep their states there.

    Args:
        req_pool: which says where each row's states are.
        can_be_put_away: whether the pool's memory may be given back.
    """

    def __init__(
        self,
        model: nn.Module,
        num_slots: int,
        dtype: torch.dtype,
        req_pool: ReqToPagePool,
        *,
        can_be_put_away: bool,
    ):
        layers = linear_layers(model)
        self._req_pool = req_pool
        self.passes = DeltaPasses()
        self.pool = StatePool(
            num_slots=num_slots,
            layers=[layer.spec for layer in layers],
            dtype=dtype,
            device=req_pool.req_to_page.device,
            can_be_put_away=can_be_put_away,
        )
        for layer in layers:
            layer.bind(self.pool, self.passes)
        logger.info("states of %d linear layers: %d of %.3f MB", len(layers), num_slots, self.pool.slot_bytes / 1e6)

    def begin_pass(self, moves: StateMoves) -> None:
        """Do what comes before the pass."""
        if moves.rows:
            self._req_pool.place_states(moves.rows, moves.slots)
        self.pool.copy(moves.sources, moves.targets)

    def end_pass(self, moves: StateMoves) -> None:
        """Do what comes behind it."""
        self.pool.copy(moves.kept_sources, moves.kept_targets)
