"""Owns reading compressed-tensors' part of a config: one group of all linear layers, in one of its formats."""

from collections.abc import Mapping
from typing import Any

from ramet.srt.configs.left_out_modules import checked_patterns
from ramet.srt.configs.quantization_config import QuantizationConfig
from ramet.srt.configs.quantization_section import Section, block_size, expect_known_cache
from ramet.srt.configs.weight_format import WHOLE, WeightFormat, fp8_blocks, fp8_rows, int8, mxfp4, nvfp4, packed_int


def read_compressed_tensors(section: Mapping[str, Any], where: str) -> QuantizationConfig:
    """Raises ValueError for what is not served or not known."""
    keys = Section(section, where)
    keys.ignore("quant_method", "quantization_status", "global_compression_ratio", "version")
    spelling = keys.expect("format", *_READERS, default="float-quantized")
    if sparsity := keys.section("sparsity_config"):
        sparsity.expect("format", "dense", default="dense")
    groups = keys.section("config_groups")
    ignored = checked_patterns(keys.names("ignore"), where, "re:")
    expect_known_cache(keys)
    keys.finish()  # transform_config and what comes later
    names = groups.left if groups is not None else []
    group = groups.section(names[0]) if groups is not None and len(names) == 1 else None
    if group is None:
        raise ValueError(f"{where}: config_groups must hold one group; it holds {', '.join(names) or 'none'}")
    spelling = group.expect("format", *_READERS, default=spelling)
    targets = group.names("targets")
    if targets != ("Linear",):
        raise ValueError(f"{group.where}: targets {list(targets)} is not supported; ['Linear'] is")
    weights, activations = group.section("weights"), group.section("input_activations")
    group.finish()
    if weights is None:
        raise ValueError(f"{group.where}: it does not say how weights are quantised")
    _ignore_search(weights)
    weights.expect("dynamic", False, default=False)
    weight_format = _READERS[spelling](weights, activations)
    weights.finish()
    return QuantizationConfig(method="compressed-tensors", file=where, format=weight_format, ignored=ignored)


def _read_float(weights: Section, activations: Section | None) -> WeightFormat:
    weights.expect("num_bits", 8)
    weights.expect("type", "float")
    weights.expect("symmetric", True, default=True)
    strategy = weights.expect("strategy", "channel", "tensor", "block", "group", default="tensor")
    size = block_size(weights.take("block_structure"), weights.where)
    if (strategy == "block") != (size is not None):
        raise ValueError(f"{weights.where}: strategy {strategy!r} with block_structure {size} makes no sense")
    if strategy == "group":
        size = (1, _group_size(weights))
    if activations is not None:  # they keep the model's type, which is more exact: see docs/formats.md
        activations.expect("num_bits", 8)
        activations.expect("type", "float")
    if size is not None:
        return fp8_blocks(*size, multiplies_fp8=strategy == "block" and activations is not None)
    # As blocks, rows are multiplied with activations as they are, on a GPU too.
    return fp8_rows() if activations is not None else fp8_blocks(1, WHOLE)


def _read_int(weights: Section, activations: Section | None) -> WeightFormat:
    weights.expect("num_bits", 8)
    weights.expect("type", "int")
    weights.expect("symmetric", True, default=True)
    strategy = weights.expect("strategy", "channel", "tensor", "group", default="tensor")
    _expect_plain_activations(activations)
    return int8(_group_size(weights) if strategy == "group" else WHOLE)


def _read_packed(weights: Section, activations: Section | None) -> WeightFormat:
    bits = weights.expect("num_bits", 4, 8)
    weights.expect("type", "int")
    is_symmetric = weights.expect("symmetric", True, False, default=True)
    strategy = weights.expect("strategy", "channel", "group", default="group")
    columns = _group_size(weights) if strategy == "group" else WHOLE
    weights.ignore("group_size")
    order = weights.expect("actorder", None, "group", "dynamic", "weight", "static")  # the second two leave no trace
    _expect_plain_activations(activations)
    has_column_groups = order in ("group", "dynamic")
    return packed_int(bits, columns, has_zeros=not is_symmetric, has_column_groups=has_column_groups)


def _read_mxfp4(weights: Section, activations: Section | None) -> WeightFormat:
    _expect_float4(weights, "group", 32)
    _expect_plain_activations(activations)
    return mxfp4()


def _read_nvfp4(weights: Section, activations: Section | None) -> WeightFormat:
    """Its outer scale is what to divide by."""
    _expect_float4(weights, "tensor_group", 16)
    _expect_plain_activations(activations)
    return nvfp4(".weight_packed", ".weight_global_scale", divides=True)


def _expect_float4(weights: Section, strategy: str, group_size: int) -> None:
    weights.expect("num_bits", 4)
    weights.expect("type", "float")
    weights.expect("symmetric", True, default=True)
    weights.expect("strategy", strategy, default=strategy)
    weights.expect("group_size", group_size, default=group_size)


def _expect_plain_activations(activations: Section | None) -> None:
    """Activations keep the model's type, which is more exact than any of these: see docs/formats.md."""
    if activations is not None:
        activations.expect("num_bits", 4, 8)
        activations.expect("type", "int", "float")


def _ignore_search(weights: Section) -> None:
    """How scales were found, and types that the tensors have themselves."""
    weights.ignore("observer", "observer_kwargs", "scale_dtype", "zp_dtype")


def _group_size(weights: Section) -> int:
    size = weights.take("group_size")
    if type(size) is not int or size < 1:
        raise ValueError(f"{weights.where}: group_size must be a positive integer; got {size!r}")
    return size


def _read_naive(weights: Section, activations: Section | None) -> WeightFormat:
    """Both kinds of eight bits."""
    reader = _read_int if weights.says("type", "int") else _read_float
    return reader(weights, activations)


_READERS = {
    "naive-quantized": _read_naive,
    "float-quantized": _read_float,
    "mxfp8-quantized": _read_float,
    "int-quantized": _read_int,
    "pack-quantized": _read_packed,
    "mxfp4-pack-quantized": _read_mxfp4,
    "nvfp4-pack-quantized": _read_nvfp4,
}
