"""Owns a dense layer's pass of one token where its products leave their sums to who reads them; see row_sums."""

from typing import NamedTuple, TypeAlias

import torch

from ramet.srt.batch.forward_batch_info import ForwardBatch
from ramet.srt.layers.attention.radix_attention import HeadNorms, RadixAttention
from ramet.srt.layers.kernels.runtime import use_kernels
from ramet.srt.layers.layernorm import RMSNorm
from ramet.srt.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from ramet.srt.layers.mlp import GatedMLP
from ramet.srt.layers.quantization.packed import leaves_row_sums, packed_row_sums
from ramet.srt.layers.quantization.weight import QuantizedWeight, weight_of
from ramet.srt.layers.rotary_embedding import Rotation
from ramet.srt.layers.row_sums import GatedSums, RowSums, UnfinishedRow

Product: TypeAlias = MergedColumnParallelLinear | RowParallelLinear


class RowPath(NamedTuple):
    """The parts of a layer with a norm before each half and none behind."""

    input_norm: RMSNorm
    qkv_proj: MergedColumnParallelLinear
    attn: RadixAttention  # whose queries have no gates
    head_norms: HeadNorms | None
    o_proj: RowParallelLinear
    mlp_norm: RMSNorm
    mlp: GatedMLP

    def fits(self, dtype: torch.dtype) -> bool:
        """Whether this way is there for the layer's weights, which have their places; it takes kernels of all four.

        Values times a norm's weight, without its factor, can be more than float16 holds.
        """
        is_shared = self.o_proj.tp_size > 1 or self.mlp.down_proj.tp_size > 1
        if dtype != torch.bfloat16 or is_shared or not self.attn.has_kernels(self.input_norm.weight):
            return False
        weights = [weight_of(product, "weight") for product in self._products]
        return all(isinstance(weight, QuantizedWeight) and leaves_row_sums(weight, dtype) for weight in weights)

    def takes(self, x: torch.Tensor | RowSums, forward_batch: ForwardBatch) -> bool:
        """Whether what goes into the layer is one row on a GPU, and no adapters are loaded."""
        is_row = isinstance(x, RowSums) or (len(x) == 1 and use_kernels(x))
        return is_row and forward_batch.group_sizes is None and all(product.lora is None for product in self._products)

    def forward(
        self, x: torch.Tensor | RowSums, residual: torch.Tensor | None, rotary: Rotation | None, batch: ForwardBatch
    ) -> tuple[RowSums, torch.Tensor]:
        """See DecoderLayer."""
        row: UnfinishedRow
        if isinstance(x, RowSums):
            assert residual is not None
            row = self.input_norm.begin(x, residual)
        elif residual is None:
            row, residual = self.input_norm(x), x
        else:
            row, residual = self.input_norm.add_and_norm(x, residual)
        q = self.attn.rotate_and_store(_multiply(row, self.qkv_proj, x.dtype), rotary, self.head_norms, batch)
        sums = _multiply(self.attn(q, batch).flatten(1), self.o_proj, x.dtype)
        gate_up = _multiply(self.mlp_norm.begin(sums, residual), self.mlp.gate_up_proj, x.dtype)
        return _multiply(GatedSums(gate_up, self.mlp.activation), self.mlp.down_proj, x.dtype), residual

    @property
    def _products(self) -> tuple[Product, Product, Product, Product]:
        return self.qkv_proj, self.o_proj, self.mlp.gate_up_proj, self.mlp.down_proj


def _multiply(x: UnfinishedRow, product: Product, dtype: torch.dtype) -> RowSums:
    weight = weight_of(product, "weight")
    assert isinstance(weight, QuantizedWeight)
    return RowSums(packed_row_sums(x, weight, product.bias), dtype)
