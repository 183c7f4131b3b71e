"""Owns what a model's files say of a KV cache in fp8: which scales for its keys and values they hold. No torch."""

from collections.abc import Mapping
from typing import Any

AUTO, FP8_E4M3 = "auto", "fp8_e4m3"
KV_CACHE_DTYPES = (AUTO, FP8_E4M3)
OF_A_LAYER = "tensor"  # one scale for all keys of a layer and one for all values


def read_cache_scales(hf_config: Mapping[str, Any], modelopt: Mapping[str, Any] | None) -> str:
    """What shares a scale of the cache: "tensor", another strategy's name, or "" where the files hold none.

    What the keys say beside it is judged with the rest of the quantisation, by `read_quantization`.

    Args:
        modelopt: the content of hf_quant_config.json, if there is one.
    """
    section = hf_config.get("quantization_config") or hf_config.get("compression_config")
    inner = modelopt.get("quantization") if modelopt is not None else None
    found = [_read_section(part) for part in (section, inner) if isinstance(part, Mapping)]
    return next(filter(None, found), "")


def _read_section(section: Mapping[str, Any]) -> str:
    if section.get("kv_cache_quant_algo") == "FP8":  # modelopt's
        return OF_A_LAYER
    scheme = section.get("kv_cache_scheme")
    if scheme == "static":  # AutoFP8's
        return OF_A_LAYER
    if not isinstance(scheme, Mapping) or scheme.get("dynamic"):
        return ""
    return str(scheme.get("strategy") or OF_A_LAYER)


def check_cache_dtype(dtype: str, scales: str, file: str) -> None:
    """Raises ValueError if a KV cache of that type can't use the scales that the model's files hold."""
    if dtype == FP8_E4M3 and scales not in ("", OF_A_LAYER):
        raise ValueError(
            f"--kv-cache-dtype {dtype} takes one scale for the keys of a layer and one for its values; {file} says "
            f"that this model has scales by {scales!r}"
        )
