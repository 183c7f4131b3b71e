"""Owns the layer between the projections of a gated delta net: convolution, delta rule, gated norm, and the states."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ramet.srt.batch.forward_batch_info import ForwardBatch
from ramet.srt.configs.delta_config import DeltaTraits
from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.layers.attention.delta_passes import DeltaPasses
from ramet.srt.layers.delta_rule import causal_conv, delta_chunks, delta_step
from ramet.srt.layers.kernels.runtime import use_kernels
from ramet.srt.layers.parameter import declare_weight, divide, shard_box
from ramet.srt.mem_cache.state_pool import StatePool, StateSpec
from ramet.srt.weights.manifest import WeightBox


@dataclass(frozen=True)
class DeltaHeads:
    """The heads of one rank, and where their columns stand in what the projections give."""

    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int
    is_by_key_head: bool  # a key head's columns stand together: query, key, its value heads' values, and their gates

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Columns of queries, keys, values and gates."""
        keys, values = self.num_key_heads * self.key_dim, self.num_value_heads * self.value_dim
        return keys, keys, values, values

    @property
    def num_channels(self) -> int:
        """Of the convolution: queries, keys and values."""
        return sum(self.sizes[:3])

    def split(self, qkvz: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[num_tokens, all columns] -> the channels, queries first, then keys and values; and the gates."""
        if not self.is_by_key_head:
            channels, z = qkvz.split([self.num_channels, self.sizes[3]], dim=-1)
            return channels, z
        parts = qkvz.unflatten(-1, (self.num_key_heads, -1)).split([n // self.num_key_heads for n in self.sizes], -1)
        q, k, v, z = (part.flatten(1) for part in parts)
        return torch.cat((q, k, v), dim=-1), z

    def split_numbers(self, ba: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[num_tokens, 2 * num_value_heads] -> what says how much is written, and how much is forgotten."""
        if not self.is_by_key_head:
            b, a = ba.chunk(2, dim=-1)
            return b, a
        b, a = ba.unflatten(-1, (self.num_key_heads, -1)).chunk(2, dim=-1)
        return b.flatten(1), a.flatten(1)


class GatedDelta(nn.Module):
    """Reads and writes the states of a pass's sequences. It can run once it is bound to the rank's pool.

    Args:
        prefix: of the layer in the checkpoint.
        eps: of the norm of the output.
        place: of the layer among those of the rank that have a state.
    """

    pool: StatePool
    passes: DeltaPasses

    def __init__(
        self,
        traits: DeltaTraits,
        prefix: str,
        *,
        eps: float,
        place: int,
        dtype: torch.dtype,
        parallel: ParallelConfig,
    ):
        super().__init__()
        size, rank = parallel.tp_size, parallel.tp_rank
        self.heads = heads = DeltaHeads(
            divide(traits.num_key_heads, size, f"{prefix}: key heads"),
            divide(traits.num_value_heads, size, f"{prefix}: value heads"),
            traits.key_dim,
            traits.value_dim,
            traits.is_by_key_head,
        )
        self.eps = eps
        self.place = place
        boxes, whole, first, target = [], sum(heads.sizes[:3]) * size, 0, 0
        for part in heads.sizes[:3]:
            start = first + rank * part
            rest = ((0, 1), (0, traits.kernel_size))
            source, to = ((start, start + part), *rest), ((target, target + part), *rest)
            boxes.append(WeightBox(f"{prefix}.conv1d.weight", source, to))
            first, target = first + part * size, target + part
        assert first == whole
        self.conv = declare_weight((heads.num_channels, 1, traits.kernel_size), dtype, boxes)

        def by_head(name: str) -> nn.Parameter:
            total, own = traits.num_value_heads, heads.num_value_heads
            box = shard_box(f"{prefix}.{name}", (total,), 0, rank * own, (rank + 1) * own)
            return declare_weight((own,), torch.float32, [box])

        # In float32, as some checkpoints have them: they are few, and exponents.
        self.a_log = by_head("A_log")
        self.dt_bias = by_head("dt_bias")
        norm = shard_box(f"{prefix}.norm.weight", (traits.value_dim,), 0, 0, traits.value_dim)
        self.norm = declare_weight((traits.value_dim,), torch.float32, [norm])
        self.spec = StateSpec(
            heads.num_channels, traits.kernel_size - 1, heads.num_value_heads, traits.key_dim, traits.value_dim
        )

    def bind(self, pool: StatePool, passes: DeltaPasses) -> None:
        """Keep states in `pool` from now on.

        Args:
            passes: what the kernels read of the pass under way.
        """
        self.pool = pool
        self.passes = passes

    def forward(self, qkvz: torch.Tensor, ba: torch.Tensor, forward_batch: ForwardBatch) -> torch.Tensor:
        """Columns of the projections (see DeltaHeads) -> [num_tokens, num_value_heads * value_dim]."""
        if use_kernels(qkvz):
            return self._run_kernels(qkvz, ba, forward_batch)
        x, z = self.heads.split(qkvz)
        b, a = self.heads.split_numbers(ba)
        g = -self.a_log.exp() * F.softplus(a.float() + self.dt_bias)
        out = self._mix(x, g, b.float().sigmoid(), forward_batch)
        scaled = F.rms_norm(out.float(), self.norm.shape, self.norm, self.eps)
        return (scaled * F.silu(z.float()).view_as(scaled)).to(qkvz.dtype).flatten(1)

    def _run_kernels(self, qkvz: torch.Tensor, ba: torch.Tensor, forward_batch: ForwardBatch) -> torch.Tensor:
        from ramet.srt.layers.kernels.delta_conv import convolve
        from ramet.srt.layers.kernels.delta_rule import delta_rule

        heads, table, run = self.heads, forward_batch.state_slots, self.passes.current
        assert table is not None, "a pool of requests has places for states where layers have some"
        mixed = convolve(
            qkvz,
            self.pool.conv(self.place),
            self.conv,
            table,
            run,
            num_key_heads=heads.num_key_heads,
            key_dim=heads.key_dim,
            values=heads.sizes[2] // heads.num_key_heads,
            is_by_key_head=heads.is_by_key_head,
        )
        return delta_rule(
            mixed,
            qkvz,
            ba,
            self.pool.matrices(self.place),
            table,
            run,
            a_log=self.a_log,
            dt_bias=self.dt_bias,
            norm=self.norm,
            eps=self.eps,
            num_key_heads=heads.num_key_heads,
            is_by_key_head=heads.is_by_key_head,
        )

    def _mix(self, x: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, forward_batch: ForwardBatch) -> torch.Tensor:
        """Channels, decays and shares to write of each token -> [num_tokens, num_value_heads, value_dim]."""
        tokens, table = forward_batch.tokens, forward_batch.state_slots
        assert table is not None, "a pool of requests has places for states where layers have some"
        slots = table[forward_batch.rows]
        out = x.new_empty((len(x), self.heads.num_value_heads, self.heads.value_dim))
        is_single = torch.from_numpy(tokens.lens == 1)
        if bool(is_single.any()):
            where = torch.from_numpy(tokens.first_tokens[:-1])[is_single].to(x.device)
            own = slots[is_single.to(x.device)]
            out[where] = self._step(x[where], g[where], beta[where], own, forward_batch.positions[where] == 0)
        for index in torch.nonzero(~is_single).flatten().tolist():
            first, stop = tokens.first_tokens[index : index + 2].tolist()
            saves = tokens.saves_of(index)
            is_new = bool(tokens.starts[index] == 0)
            part = slice(first, stop)
            out[part] = self._sequence(x[part], g[part], beta[part], int(slots[index]), is_new, saves)
        return out

    def _step(
        self, x: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, slots: torch.Tensor, is_new: torch.Tensor
    ) -> torch.Tensor:
        """One token of each of several sequences."""
        conv, matrices = self.pool.conv(self.place), self.pool.matrices(self.place)
        before = conv[slots].masked_fill_(is_new[:, None, None], 0)
        inputs = torch.cat((before, x.unsqueeze(1)), dim=1)
        conv.index_copy_(0, slots, inputs[:, 1:])
        mixed = F.silu(torch.einsum("btc,ct->bc", inputs.float(), self.conv.squeeze(1).float())).to(x.dtype)
        state = matrices[slots].masked_fill_(is_new[:, None, None, None], 0)
        out, state = delta_step(*self._by_head(mixed), g, beta, state)
        matrices.index_copy_(0, slots, state)
        return out

    def _sequence(
        self,
        x: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        slot: int,
        is_new: bool,
        saves: list[tuple[int, int]],
    ) -> torch.Tensor:
        """Several tokens of one sequence.

        Args:
            saves: (tokens after which the state is kept as well, slot), rising.
        """
        conv, matrices = self.pool.conv(self.place), self.pool.matrices(self.place)
        before, state = conv[slot], matrices[slot]
        if is_new:
            before, state = torch.zeros_like(before), torch.zeros_like(state)
        outputs, start = [], 0
        for stop, target in (*saves, (len(x), slot)):
            part = slice(start, stop)
            mixed, before = causal_conv(x[part], self.conv.squeeze(1), before)
            out, state = delta_chunks(*self._by_head(mixed), g[part], beta[part], state)
            outputs.append(out)
            conv[target] = before
            matrices[target] = state
            start = stop
        return torch.cat(outputs)

    def _by_head(self, mixed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[num_tokens, num_channels] -> queries, keys, values, all [num_tokens, heads, columns]."""
        q, k, v = mixed.split(list(self.heads.sizes[:3]), dim=-1)
        keys, values = (-1, self.heads.key_dim), (-1, self.heads.value_dim)
        return q.unflatten(-1, keys), k.unflatten(-1, keys), v.unflatten(-1, values)
