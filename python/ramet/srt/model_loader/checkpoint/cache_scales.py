"""Owns the spellings of the scales of an fp8 KV cache in checkpoints: of keys and of values, two numbers for a layer.

Boxes name them `self_attn.k_scale` and `self_attn.v_scale`. Knows names and offsets, no data.
"""

import re
from collections.abc import Mapping

from ramet.srt.model_loader.checkpoint.safetensors_header import TensorInfo
from ramet.srt.model_loader.checkpoint.whole_model import WholeModel

# compressed-tensors, vLLM's own modules, modelopt (k_proj.k_scale), AutoFP8 (k_proj.output_scale, one for both parts).
SPELLED = re.compile(
    r"(?P<attention>.+\.self_attn)\."
    r"((attn\.|qkv_proj\.)?(?P<part>[kv]|kv)_scale|(?P<matrix>[kv])_proj\.((?P=matrix)_scale|output_scale))"
)
NAME = re.compile(r".+\.self_attn\.[kv]_scale")


def cache_scale_names(name: str) -> list[str]:
    """What boxes call the scales that a checkpoint's tensor is; empty for any other tensor."""
    match = SPELLED.fullmatch(name)
    if match is None:
        return []
    return [f"{match['attention']}.{part}_scale" for part in match["part"] or match["matrix"]]


def is_cache_scale(name: str) -> bool:
    """Whether a box of that name takes such a scale. It is 1 where the files have none."""
    return NAME.fullmatch(name) is not None


def settle_cache_scales(path: str, tensors: Mapping[str, TensorInfo], whole: WholeModel) -> dict[str, TensorInfo]:
    """A file's tensors with such scales under the names, and in the shape, that boxes have; others stay as they are.

    Raises:
        ValueError: if one is there twice, or the cache is in fp8 and the config does not say that it has scales.
    """
    result: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        names = cache_scale_names(name)
        if not whole.shapes.keys() & set(names):
            if names and whole.has_fp8_cache and not name.endswith(".output_scale"):
                raise ValueError(
                    f"{path} has {name}, a scale for a KV cache in fp8, but config.json has no kv_cache_scheme that "
                    "says so, by which --kv-cache-dtype fp8_e4m3 would use it; add that, or leave such tensors out"
                )
            names = [name]
        elif info.shape == ():
            info = TensorInfo(info.dtype, (1,), info.offset, info.nbytes)
        for settled in names:
            if settled in result:
                raise ValueError(f"{path} has {settled} twice: {name} says it too")
            result[settled] = info
    return result
