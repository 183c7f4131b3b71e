"""Owns reading what a model's configs say of its quantised weights: key by key, refused where not served.

Methods are spelled in config.json's `quantization_config`; modelopt has a file of its own, too: hf_quant_config.json.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from ramet.srt.configs.compressed_tensors_config import read_compressed_tensors
from ramet.srt.configs.gptq_config import read_awq, read_gptq
from ramet.srt.configs.left_out_modules import PLAIN_NAMING, ModuleNaming, checked_patterns
from ramet.srt.configs.quantization_config import QuantizationConfig
from ramet.srt.configs.quantization_section import Section, block_size, expect_known_cache
from ramet.srt.configs.weight_format import BLOCKS, WeightFormat, fp8_blocks, fp8_rows, mxfp4, nvfp4

CONFIG_FILE = "config.json"
MODELOPT_FILE = "hf_quant_config.json"


def read_quantization(
    hf_config: Mapping[str, Any],
    modelopt: Mapping[str, Any] | None,
    folder: str,
    wanted: str | None,
    naming: ModuleNaming = PLAIN_NAMING,
) -> QuantizationConfig | None:
    """What the files of a model say, and the user wants; None for weights that are not quantised.

    Args:
        modelopt: the content of hf_quant_config.json, if there is one.
        wanted: "fp8" to quantise plain weights while they are read; changes nothing for a checkpoint of fp8 weights.
        naming: of the model's modules, in lists of those that are not quantised.

    Raises:
        ValueError: for anything that is not served, or not known; the message names the file and the word in it.
    """
    found = []
    for key in ("quantization_config", "compression_config"):  # the second is compressed-tensors' older one
        if section := hf_config.get(key):
            found.append(_read_section(section, f"{folder}/{CONFIG_FILE}: {key}"))
            break
    if modelopt is not None:
        found.append(_read_modelopt_file(modelopt, f"{folder}/{MODELOPT_FILE}"))
    known = [config for config in found if config is not None]
    if len(found) == 2 and len({config and config.format for config in found}) > 1:
        said = [f"{config.name} by {config.format.summary}" if config else "no quantised weights" for config in found]
        raise ValueError(f"{folder}: {CONFIG_FILE} says {said[0]}, {MODELOPT_FILE} says {said[1]}")
    if not known:
        return QuantizationConfig(method="online", file="--quantization fp8", format=fp8_rows()) if wanted else None
    if wanted and wanted != known[0].name:
        raise ValueError(f"--quantization {wanted} is for plain weights; {known[0].file} says {known[0].name}")
    return dataclasses.replace(known[0], naming=naming)


def _read_section(section: Any, where: str) -> QuantizationConfig | None:
    if not isinstance(section, Mapping):
        raise ValueError(f"{where} must be an object; got {section!r}")
    method = section.get("quant_method")
    if method is None and "quant_algo" in section:
        method = "modelopt"
    reader = _READERS.get(str(method))
    if reader is None:
        served = ", ".join(dict.fromkeys(_READERS))
        raise ValueError(f"{where}: the quantisation {method!r} is not supported; served are {served}")
    return reader(section, where)


def _read_fp8(section: Mapping[str, Any], where: str) -> QuantizationConfig:
    """Fine-grained fp8: DeepSeek's spelling, which transformers, SGLang and vLLM read."""
    keys = Section(section, where)
    keys.ignore("quant_method", "dequantize", "is_checkpoint_fp8_serialized")  # loaded or dequantised: the same values
    size = block_size(keys.take("weight_block_size"), where)
    keys.expect("fmt", "e4m3", "float8_e4m3fn", default="e4m3")
    keys.expect("scale_fmt", "float", "ue8m0", default="float")  # the scales' own type tells which
    keys.expect("expert_dtype", "fp8", default="fp8")
    keys.expect("activation_scheme", "dynamic", "static", default="dynamic")
    ignored = _left_out(keys, where)
    expect_known_cache(keys)
    keys.finish()
    weight_format = fp8_blocks(*size, multiplies_fp8=True) if size else fp8_rows()
    return QuantizationConfig(method="fp8", file=where, format=weight_format, ignored=ignored)


def _left_out(keys: Section, where: str) -> tuple[str, ...]:
    ignored = keys.names("modules_to_not_convert") or keys.names("ignored_layers")
    keys.ignore("ignored_layers")
    return checked_patterns(ignored, where, "")


def _read_fbgemm(section: Mapping[str, Any], where: str) -> QuantizationConfig:
    """Llama 3.1's fp8, by row. Its upper bound of activations is not needed where those keep their type."""
    keys = Section(section, where)
    keys.ignore("quant_method", "activation_scale_ub")
    ignored = _left_out(keys, where)
    keys.finish()
    return QuantizationConfig(method="fbgemm_fp8", file=where, format=fp8_rows(), ignored=ignored)


def _read_mxfp4(section: Mapping[str, Any], where: str) -> QuantizationConfig:
    """gpt-oss's: stacked experts alone, of which the files hold blocks of 32 columns and their scales."""
    keys = Section(section, where)
    keys.ignore("quant_method", "dequantize")
    ignored = _left_out(keys, where)
    keys.finish()
    return QuantizationConfig(method="mxfp4", file=where, format=mxfp4(BLOCKS, "_scales"), ignored=ignored)


def _read_mxfp8(section: Mapping[str, Any], where: str) -> QuantizationConfig:
    """SGLang's spelling: fp8 with a power of two for 32 columns."""
    keys = Section(section, where)
    keys.ignore("quant_method")
    size = block_size(keys.take("weight_block_size"), where) or (1, 32)
    keys.expect("fmt", "e4m3", default="e4m3")
    keys.expect("scale_fmt", "ue8m0", default="ue8m0")
    keys.expect("activation_scheme", "dynamic", default="dynamic")
    ignored = _left_out(keys, where)
    keys.finish()
    return QuantizationConfig(method="mxfp8", file=where, format=fp8_blocks(*size), ignored=ignored)


def _modelopt_formats() -> dict[str, WeightFormat]:
    fp4 = nvfp4(".weight", ".weight_scale_2", divides=False)
    fp8 = fp8_rows()
    return {"FP8": fp8, "FP8_PER_CHANNEL_PER_TOKEN": fp8, "NVFP4": fp4, "W4A16_NVFP4": fp4}


def _read_modelopt(section: Mapping[str, Any], where: str) -> QuantizationConfig | None:
    """modelopt's part of config.json; its groups say again what the algorithm's name does."""
    keys = Section(section, where)
    keys.ignore("quant_method", "producer", "config_groups")
    return _modelopt_config(keys)


def _read_modelopt_file(content: Mapping[str, Any], where: str) -> QuantizationConfig | None:
    keys = Section(content, where)
    keys.ignore("producer")
    inner = keys.section("quantization")
    keys.finish()
    if inner is None:
        raise ValueError(f"{where}: it has no object 'quantization'")
    inner.ignore("quant_method")
    return _modelopt_config(inner)


def _modelopt_config(keys: Section) -> QuantizationConfig | None:
    algorithm, formats = keys.take("quant_algo"), _modelopt_formats()
    if algorithm is not None and algorithm not in formats:
        raise ValueError(
            f"{keys.where}: the quantisation {algorithm!r} is not supported; of modelopt's, {', '.join(formats)} are"
        )
    keys.expect("kv_cache_quant_algo", None, "FP8")
    expect_known_cache(keys)
    ignored = dict.fromkeys(keys.names("exclude_modules") + keys.names("ignore"))
    if algorithm is not None and formats[algorithm].name == "nvfp4":
        keys.expect("group_size", 16, default=16)
    keys.finish()
    if algorithm is None:
        return None
    return QuantizationConfig(
        method="modelopt", file=keys.where, format=formats[algorithm],
        ignored=checked_patterns(ignored, keys.where, None),
    )  # fmt: skip


_READERS: dict[str, Callable[[Mapping[str, Any], str], QuantizationConfig | None]] = {
    "fp8": _read_fp8,
    "fbgemm_fp8": _read_fbgemm,
    "mxfp4": _read_mxfp4,
    "mxfp8": _read_mxfp8,
    "compressed-tensors": read_compressed_tensors,
    "awq": read_awq,
    "gptq": read_gptq,
    "modelopt": _read_modelopt,
    "modelopt_fp8": _read_modelopt,
    "modelopt_fp4": _read_modelopt,
}
