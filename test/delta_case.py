"""Makes a gated delta net's layer with random weights, and passes over it, for tests and benchmarks of its kernels."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from ramet.srt.batch.forward_batch_info import ForwardBatch
from ramet.srt.batch.pass_tokens import PassTokens
from ramet.srt.configs.delta_config import DeltaTraits
from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.layers.attention import gated_delta
from ramet.srt.layers.attention.delta_passes import DeltaPasses
from ramet.srt.layers.attention.gated_delta import GatedDelta
from ramet.srt.mem_cache.memory_pool import ReqToPagePool
from ramet.srt.mem_cache.state_pool import StatePool
from ramet.srt.model_executor.pass_batch import make_forward_batch

PAGE_SIZE = 16


class Part(NamedTuple):
    """What a pass computes of a sequence."""

    row: int
    start: int
    length: int
    saves: tuple[tuple[int, int], ...] = ()


class DeltaCase:
    """A layer and its states: the slot of each row is the row's number and one more."""

    def __init__(
        self,
        device: torch.device,
        traits: DeltaTraits,
        dtype: torch.dtype,
        *,
        num_rows: int = 6,
        num_slots: int | None = None,
        seed: int = 0,
    ):
        self.generator = torch.Generator(device).manual_seed(seed)
        self.device, self.dtype = device, dtype
        self.layer = GatedDelta(traits, "linear_attn", eps=1e-6, place=0, dtype=dtype, parallel=ParallelConfig())
        heads = self.layer.heads
        self.widths = sum(heads.sizes), 2 * heads.num_value_heads
        with torch.no_grad():
            for name, scale, offset in (("conv", 0.6, 0.0), ("a_log", 1.0, -2.0), ("dt_bias", 0.3, 0.0),
                                        ("norm", 0.3, 1.0)):  # fmt: skip
                meta = getattr(self.layer, name)
                values = (self.randn(meta.shape) * scale + offset).to(meta.dtype)
                setattr(self.layer, name, torch.nn.Parameter(values, requires_grad=False))
        self.req_pool = ReqToPagePool(num_rows, 4096, device, has_states=True)
        self.req_pool.place_states(range(num_rows), range(1, num_rows + 1))
        num_slots = 2 * num_rows if num_slots is None else num_slots
        self.pool = StatePool(num_slots=num_slots, layers=[self.layer.spec], dtype=dtype, device=device)
        self.passes = DeltaPasses()
        self.layer.bind(self.pool, self.passes)

    def randn(self, shape: Sequence[int]) -> torch.Tensor:
        return torch.randn(tuple(shape), generator=self.generator, device=self.device)

    def fill_states(self) -> None:
        """As if every slot held a sequence."""
        self.pool.conv(0).copy_(self.randn(self.pool.conv(0).shape))
        self.pool.matrices(0).copy_(self.randn(self.pool.matrices(0).shape) * 0.3)

    def batch(self, parts: Sequence[Part]) -> ForwardBatch:
        lens = [part.length for part in parts]
        tokens = PassTokens.padding(0, lens)
        tokens.rows[:] = [part.row for part in parts]
        tokens.starts[:] = [part.start for part in parts]
        tokens.saves = [list(part.saves) for part in parts]
        return make_forward_batch(self.req_pool, PAGE_SIZE, tokens)

    def inputs(self, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What the projections give: columns of more than the layer takes, so that rows are apart."""
        first, second = (self.randn((num_tokens, width + 8)).to(self.dtype) for width in self.widths)
        return first[:, : self.widths[0]], second[:, : self.widths[1]]

    def run(self, batch: ForwardBatch, inputs: tuple[torch.Tensor, torch.Tensor], *, kernels: bool) -> torch.Tensor:
        """The layer's output by the kernels, or by plain torch."""
        before = gated_delta.use_kernels
        gated_delta.use_kernels = lambda _x: kernels
        try:
            return self.layer(*inputs, batch)
        finally:
            gated_delta.use_kernels = before
