"""Owns the matrix between latent rows and the heads' keys and values, and how queries and results are taken over it.

It is only viewed: a head's keys are K c of a row c, so that q (K c) = (K^T q) c, and the sum of weighted values V c is
V times the sum of weighted rows. So attention reads rows alone, and no weight is derived from the checkpoint's.
"""

import torch
from torch import nn

from ramet.srt.configs.latent_config import LatentTraits
from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.layers.kernels.runtime import has_fp8_units, use_kernels
from ramet.srt.layers.parameter import declare_weight, divide, shard_box
from ramet.srt.layers.quantization.dequantize import dequantize
from ramet.srt.layers.quantization.weight import QuantizedWeight, weight_of


class LatentHeads(nn.Module):
    """kv_b_proj: of each head first the rows of its keys, then those of its values. Heads are split over the ranks.

    Args:
        name: of the matrix in the checkpoint.
    """

    quantisable_weights = ("weight",)

    def __init__(
        self, latent: LatentTraits, num_heads: int, name: str, *, dtype: torch.dtype, parallel: ParallelConfig
    ):
        super().__init__()
        self.num_heads = divide(num_heads, parallel.tp_size, f"{name}: attention heads")
        self.nope_dim, self.value_dim, self.rank, self.dtype = latent.nope_dim, latent.value_dim, latent.kv_rank, dtype
        size = latent.nope_dim + latent.value_dim
        rows, start = self.num_heads * size, parallel.tp_rank * self.num_heads * size
        box = shard_box(f"{name}.weight", (num_heads * size, latent.kv_rank), 0, start, start + rows)
        self.weight = declare_weight((rows, latent.kv_rank), dtype, [box])  # [rows of this rank's heads, kv_rank]

    def take_queries(self, q: torch.Tensor, out: torch.Tensor) -> None:
        """Queries against keys [num_tokens, num_heads, nope_dim] -> against rows, into `out` [..., kv_rank]."""
        weight = weight_of(self, "weight")
        if isinstance(weight, QuantizedWeight) and reads_fp8(weight, q.dtype):
            multiply_heads(q, weight, out, first_row=0, rows_are_outputs=False)
        else:
            torch.bmm(q.transpose(0, 1), self._heads()[:, : self.nope_dim], out=out.transpose(0, 1))

    def take_results(self, x: torch.Tensor) -> torch.Tensor:
        """Sums of rows [num_tokens, num_heads, kv_rank] -> sums of values [num_tokens, num_heads, value_dim]."""
        weight = weight_of(self, "weight")
        out = x.new_empty((*x.shape[:2], self.value_dim))
        if isinstance(weight, QuantizedWeight) and reads_fp8(weight, x.dtype):
            multiply_heads(x, weight, out, first_row=self.nope_dim, rows_are_outputs=True)
        else:
            values = self._heads()[:, self.nope_dim :]
            torch.bmm(x.transpose(0, 1), values.transpose(1, 2), out=out.transpose(0, 1))
        return out

    def matrix(self) -> torch.Tensor:
        """[rows of this rank's heads, kv_rank]: the weight itself; of a quantised one, what it stands for."""
        weight = weight_of(self, "weight")
        return dequantize(weight, self.dtype) if isinstance(weight, QuantizedWeight) else weight

    def _heads(self) -> torch.Tensor:
        """[num_heads, nope_dim + value_dim, kv_rank]: a view of that."""
        return self.matrix().view(self.num_heads, -1, self.rank)


def reads_fp8(weight: QuantizedWeight, dtype: torch.dtype) -> bool:
    """Whether `multiply_heads` takes such a matrix for x of `dtype`: one of fp8, on a GPU that knows it.

    Its blocks are too large for float32, whose products the matrix units don't make.
    """
    is_known = weight.format.numbers == "e4m3" and dtype != torch.float32
    return is_known and use_kernels(weight.values) and has_fp8_units(weight.device)


def multiply_heads(
    x: torch.Tensor, weight: QuantizedWeight, out: torch.Tensor, *, first_row: int, rows_are_outputs: bool
) -> None:
    """Products of each head with rows of its own part of the matrix, which is read as it is; see `head_product`."""
    from ramet.srt.layers.kernels.head_products import head_product

    index = weight.layout.indices["scales"]
    assert index.first_column == 0, "all ranks have all columns"
    head_product(
        x,
        weight.values,
        weight.scales,
        None if index.is_regular else index.rows,
        (weight.format.scales.rows, index.columns),
        out,
        first_row=first_row,
        rows_are_outputs=rows_are_outputs,
    )
