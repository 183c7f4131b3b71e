"""Owns the linear layers and the rule by which each is sharded over tensor-parallel ranks."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.distributed.communication_op import tensor_model_parallel_all_reduce
from ramet.srt.layers.activation import Activation, act_and_mul
from ramet.srt.layers.fp8_matmul import Rows, activate_for
from ramet.srt.layers.lora import LoraSlots
from ramet.srt.layers.matmul import multiply_row, project, takes_gemv
from ramet.srt.layers.parameter import declare_weight, divide, shard_box
from ramet.srt.layers.quantization.weight import weight_of
from ramet.srt.weights.manifest import WeightBox


class MergedColumnParallelLinear(nn.Module):
    """Several checkpoint matrices with the same input as one: y = x W^T + b, output rows split over the ranks.

    Args:
        names: checkpoint prefixes of the parts, in the order in which their rows stand.
        output_sizes: rows of each part in the checkpoint.
    """

    quantisable_weights = ("weight",)
    lora: LoraSlots | None = None  # of adapters, where there can be some

    def __init__(
        self,
        input_size: int,
        names: Sequence[str],
        output_sizes: Sequence[int],
        *,
        bias: bool,
        dtype: torch.dtype,
        parallel: ParallelConfig,
    ):
        super().__init__()
        shards = [divide(size, parallel.tp_size, name) for name, size in zip(names, output_sizes, strict=True)]
        ranges = [(parallel.tp_rank * shard, (parallel.tp_rank + 1) * shard) for shard in shards]
        self._declare(input_size, names, output_sizes, ranges, bias, dtype)

    def _declare(
        self,
        input_size: int,
        names: Sequence[str],
        output_sizes: Sequence[int],
        ranges: Sequence[tuple[int, int]],
        bias: bool,
        dtype: torch.dtype,
    ) -> None:
        """Stack rows `ranges[i]` of each checkpoint matrix."""
        weight_boxes: list[WeightBox] = []
        bias_boxes: list[WeightBox] = []
        rows = 0
        for name, size, (start, stop) in zip(names, output_sizes, ranges, strict=True):
            weight_boxes.append(shard_box(f"{name}.weight", (size, input_size), 0, start, stop, rows))
            bias_boxes.append(shard_box(f"{name}.bias", (size,), 0, start, stop, rows))
            rows += stop - start
        self.matrices = tuple(weight_boxes)  # of which the weight is made, however it is quantised
        self.weight = declare_weight((rows, input_size), dtype, weight_boxes)  # [rows of this rank, input_size]
        self.bias = declare_weight((rows,), dtype, bias_boxes) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[num_tokens, input_size] -> [num_tokens, output rows of this rank]."""
        y = project(x, weight_of(self, "weight"), self.bias)
        return y if self.lora is None else self.lora.add(x, y)

    def gated(self, x: torch.Tensor, activation: Activation, user: "RowParallelLinear") -> Rows:
        """activation(first half) * second half of the output, for the layer that takes it.

        [num_tokens, input_size] -> [num_tokens, half of the output rows of this rank].
        """
        weight = weight_of(self, "weight")
        if self.lora is None and takes_gemv(x, weight):
            return multiply_row(x, weight, self.bias, activation.name)
        y = self.forward(x)
        if user.lora is not None:  # adapters take activations as they are
            return act_and_mul(y, activation)
        return activate_for(y, activation, weight_of(user, "weight"))


class SlicedColumnParallelLinear(MergedColumnParallelLinear):
    """The same where a checkpoint matrix has several parts, each of which is split over the ranks.

    Args:
        parts: rows of each matrix's parts, by its checkpoint prefix, in the order in which they stand.
    """

    def __init__(
        self, input_size: int, parts: Mapping[str, Sequence[int]], *, dtype: torch.dtype, parallel: ParallelConfig
    ):
        nn.Module.__init__(self)
        names, sizes, ranges = [], [], []
        for name, rows in parts.items():
            first = 0
            for size in rows:
                shard = divide(size, parallel.tp_size, name)
                start = first + parallel.tp_rank * shard
                names.append(name)
                sizes.append(sum(rows))
                ranges.append((start, start + shard))
                first += size
        self._declare(input_size, names, sizes, ranges, False, dtype)


class QKVParallelLinear(MergedColumnParallelLinear):
    """The q, k and v projections as one. Ranks beyond the number of KV heads share them (replication).

    Args:
        query_columns: rows of a head's queries; None: `head_dim`, as of its keys and values.
    """

    def __init__(
        self,
        hidden_size: int,
        head_dim: int,
        num_heads: int,
        num_kv_heads: int,
        prefix: str,
        *,
        bias: bool,
        dtype: torch.dtype,
        parallel: ParallelConfig,
        query_columns: int | None = None,
    ):
        nn.Module.__init__(self)
        query_columns = query_columns or head_dim
        tp_size, tp_rank = parallel.tp_size, parallel.tp_rank
        self.num_heads = divide(num_heads, tp_size, f"{prefix}: attention heads")
        if num_kv_heads >= tp_size:
            self.num_kv_heads = divide(num_kv_heads, tp_size, f"{prefix}: key/value heads")
            kv_start = tp_rank * self.num_kv_heads
        else:
            self.num_kv_heads = 1
            kv_start = tp_rank // divide(tp_size, num_kv_heads, f"{prefix}: ranks per key/value head")
        self.q_size = self.num_heads * query_columns
        self.kv_size = self.num_kv_heads * head_dim
        # Columns of this rank among those of all queries, and of all keys or values.
        self.q_range = q_range = (tp_rank * self.q_size, (tp_rank + 1) * self.q_size)
        self.kv_range = kv_range = (kv_start * head_dim, kv_start * head_dim + self.kv_size)
        self._declare(
            hidden_size,
            [f"{prefix}.{part}_proj" for part in "qkv"],
            [num_heads * query_columns, num_kv_heads * head_dim, num_kv_heads * head_dim],
            [q_range, kv_range, kv_range],
            bias,
            dtype,
        )


class RowParallelLinear(nn.Module):
    """y = x W^T + b with the input columns split over the ranks; the partial results are summed."""

    quantisable_weights = ("weight",)
    lora: LoraSlots | None = None  # of adapters, where there can be some

    def __init__(
        self,
        input_size: int,
        output_size: int,
        name: str,
        *,
        bias: bool,
        dtype: torch.dtype,
        parallel: ParallelConfig,
    ):
        super().__init__()
        shard = divide(input_size, parallel.tp_size, name)
        start = parallel.tp_rank * shard
        box = shard_box(f"{name}.weight", (output_size, input_size), 1, start, start + shard)
        self.matrices = (box,)
        # [output_size, columns of this rank]
        self.weight = declare_weight((output_size, shard), dtype, [box], all_columns=input_size)
        self.bias = None
        if bias:
            self.bias = declare_weight(
                (output_size,), dtype, [shard_box(f"{name}.bias", (output_size,), 0, 0, output_size)]
            )
        self.tp_size, self.tp_rank = parallel.tp_size, parallel.tp_rank

    def partial(self, x: Rows) -> torch.Tensor:
        """[num_tokens, columns of this rank] -> [num_tokens, output_size]: what this rank adds to the sum."""
        return self._project(x, self.bias if self.tp_rank == 0 else None)

    def forward(self, x: Rows) -> torch.Tensor:
        """[num_tokens, columns of this rank] -> [num_tokens, output_size], the same on every rank."""
        if self.tp_size == 1:
            return self._project(x, self.bias)
        y = tensor_model_parallel_all_reduce(self._project(x, None))
        return y if self.bias is None else y + self.bias

    def _project(self, x: Rows, bias: torch.Tensor | None) -> torch.Tensor:
        y = project(x, weight_of(self, "weight"), bias)
        if self.lora is None:
            return y
        assert isinstance(x, torch.Tensor), "see MergedColumnParallelLinear.gated"
        return self.lora.add(x, y)
