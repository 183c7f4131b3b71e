"""Owns reading the configs of GPTQ and AWQ checkpoints, whose tools share most of their keys."""

import re
from collections.abc import Mapping
from typing import Any

from ramet.srt.configs.left_out_modules import checked_patterns
from ramet.srt.configs.quantization_config import QuantizationConfig
from ramet.srt.configs.quantization_section import Section
from ramet.srt.configs.weight_format import WHOLE, awq, gptq

# How the numbers were found, by which kernels others multiply with them, and where the file comes from.
IDLE_KEYS = (
    "quant_method", "act_group_aware", "backend", "batch_size", "block_name_to_quantize", "cache_block_outputs",
    "damp_auto_increment", "damp_percent", "dataset", "disable_exllama", "exllama_config", "max_input_length",
    "meta", "model_file_base_name", "model_name_or_path", "model_seqlen", "module_name_preceding_first_block", "mse",
    "offload_to_disk", "offload_to_disk_path", "pack_impl", "pad_token_id", "static_groups", "sym", "tokenizer",
    "true_sequential", "use_cuda_fp16", "use_exllama",
)  # fmt: skip


def read_gptq(section: Mapping[str, Any], where: str) -> QuantizationConfig:
    """Raises ValueError for what is not served or not known."""
    keys = Section(section, where)
    keys.ignore(*IDLE_KEYS)
    keys.expect("method", "gptq", default="gptq")
    bits = keys.expect("bits", 4, 8, default=4)
    columns = _group_columns(keys)
    has_column_groups = keys.expect("desc_act", True, False, default=False)
    keys.expect("pack_dtype", "int32", default="int32")
    keys.expect("lm_head", False, default=False)
    version = keys.expect("checkpoint_format", "gptq", "gptq_v2", default=keys.take("format", "gptq"))
    ignored = checked_patterns((*_left_out(keys), *_outside_of_blocks(keys)), where, "")
    keys.finish()
    weight_format = gptq(bits, columns, zeros_less_one=version == "gptq", has_column_groups=has_column_groups)
    return QuantizationConfig(method="gptq", file=where, format=weight_format, ignored=ignored)


def read_awq(section: Mapping[str, Any], where: str) -> QuantizationConfig:
    """Raises ValueError for what is not served or not known."""
    keys = Section(section, where)
    keys.ignore(*IDLE_KEYS, "fuse_max_seq_len")
    keys.expect("bits", 4, default=4)
    columns = _group_columns(keys)
    keys.expect("method", "awq", default="awq")
    for name in ("version", "format", "checkpoint_format"):
        keys.expect(name, "gemm", "GEMM", default="gemm")
    keys.expect("desc_act", False, default=False)
    keys.expect("pack_dtype", "int32", default="int32")
    keys.expect("lm_head", False, default=False)
    keys.expect("zero_point", True, default=True)
    ignored = checked_patterns(keys.names("modules_to_not_convert"), where, "")
    keys.finish()
    return QuantizationConfig(method="awq", file=where, format=awq(columns), ignored=ignored)


def _group_columns(keys: Section) -> int:
    size = keys.take("group_size", 128)
    if type(size) is not int or size < -1 or size == 0:
        raise ValueError(f"{keys.where}: group_size must be a positive integer, or -1 for whole rows; got {size!r}")
    return WHOLE if size == -1 else size


def _left_out(keys: Section) -> list[str]:
    """GPTQModel's `dynamic` has settings of their own for modules by pattern; to leave them out is the one served."""
    dynamic = keys.section("dynamic")
    if dynamic is None:
        return []
    patterns = dynamic.all_names
    if other := next((pattern for pattern in patterns if not pattern.startswith("-:")), None):
        raise ValueError(
            f"{dynamic.where}: {other!r} has settings of its own; only to leave modules out (-:) is supported"
        )
    return [pattern.removeprefix("-:") for pattern in patterns]


def _outside_of_blocks(keys: Section) -> list[str]:
    """A pattern for all modules but those of `modules_in_block_to_quantize`, if that is given."""
    blocks = keys.take("modules_in_block_to_quantize")
    if blocks is None:
        return []
    if not isinstance(blocks, list) or not all(isinstance(names, list) for names in blocks):
        raise ValueError(f"{keys.where}: modules_in_block_to_quantize must be a list of lists of names; got {blocks!r}")
    names = "|".join(re.escape(str(name)) for names in blocks for name in names)
    return [rf"(?!.*\.(?:{names})$)"]
