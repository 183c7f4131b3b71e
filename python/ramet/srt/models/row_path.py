"""Owns a dense layer's pass of one token where its products leave their sums to who reads them; see row_sums."""

from typing import TYPE_CHECKING

import torch

from ramet.srt.batch.forward_batch_info import ForwardBatch
from ramet.srt.layers.kernels.runtime import use_kernels
from ramet.srt.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from ramet.srt.layers.mlp import GatedMLP
from ramet.srt.layers.quantization.packed import leaves_row_sums, packed_row_sums
from ramet.srt.layers.quantization.weight import QuantizedWeight, weight_of
from ramet.srt.layers.rotary_embedding import Rotation
from ramet.srt.layers.row_sums import GatedSums, RowSums, UnfinishedRow

if TYPE_CHECKING:
    from ramet.srt.models.decoder import Attention, DecoderLayer

Product = MergedColumnParallelLinear | RowParallelLinear


class RowPath:
    """The layer's parts, once it is known that all of them take this way."""

    def __init__(self, layer: "DecoderLayer", attention: "Attention", mlp: GatedMLP):
        self.attention, self.mlp = attention, mlp
        self.products: tuple[Product, ...] = (
            attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj,
        )  # fmt: skip
        before_attention, _, before_mlp, _ = layer.norm_names
        self.input_norm, self.mlp_norm = getattr(layer, before_attention), getattr(layer, before_mlp)

    def takes(self, x: torch.Tensor | RowSums, forward_batch: ForwardBatch) -> bool:
        """Whether what goes into the layer is one row on a GPU, and no adapters are loaded."""
        is_row = isinstance(x, RowSums) or (len(x) == 1 and use_kernels(x))
        return is_row and forward_batch.group_sizes is None and all(product.lora is None for product in self.products)

    def forward(
        self, x: torch.Tensor | RowSums, residual: torch.Tensor | None, rotary: Rotation | None, batch: ForwardBatch
    ) -> tuple[RowSums, torch.Tensor]:
        """See DecoderLayer."""
        row: UnfinishedRow
        if isinstance(x, RowSums):
            assert residual is not None
            row = self.input_norm.begin(x, residual)
        else:
            row, residual = (self.input_norm(x), x) if residual is None else self.input_norm.add_and_norm(x, residual)
        attend = self.attention.attn
        q = attend.rotate_and_store(
            _multiply(row, self.attention.qkv_proj, x.dtype), rotary, self.attention.norms, batch
        )
        sums = _multiply(attend(q, batch).flatten(1), self.attention.o_proj, x.dtype)
        gate_up = _multiply(self.mlp_norm.begin(sums, residual), self.mlp.gate_up_proj, x.dtype)
        return _multiply(GatedSums(gate_up, self.mlp.activation), self.mlp.down_proj, x.dtype), residual


def row_path_of(layer: "DecoderLayer", dtype: torch.dtype) -> RowPath | None:
    """The way of a single token through the layer, whose weights are there; None if some part has no kernel for it.

    Values times a norm's weight, without its factor, can be more than float16 holds.
    """
    from ramet.srt.models.decoder import Attention

    attention, mlp = getattr(layer, layer.attention_name), getattr(layer, layer.mlp_name)
    if not isinstance(attention, Attention) or not isinstance(mlp, GatedMLP) or dtype != torch.bfloat16:
        return None
    before_attention, after_attention, before_mlp, after_mlp = layer.norm_names
    is_plain = before_attention and before_mlp and not after_attention and not after_mlp and layer.multiplier == 1
    if not is_plain or attention.wide_norms is not None or attention.attn.has_gate:
        return None
    path = RowPath(layer, attention, mlp)
    weights = [weight_of(product, "weight") for product in path.products]
    is_shared = attention.o_proj.tp_size > 1 or mlp.down_proj.tp_size > 1
    if is_shared or not attention.attn.has_kernels(next(layer.parameters())):
        return None
    takes = all(isinstance(weight, QuantizedWeight) and leaves_row_sums(weight, dtype) for weight in weights)
    return path if takes else None


def _multiply(x: UnfinishedRow, product: Product, dtype: torch.dtype) -> RowSums:
    weight = weight_of(product, "weight")
    assert isinstance(weight, QuantizedWeight)
    return RowSums(packed_row_sums(x, weight, product.bias), dtype)
