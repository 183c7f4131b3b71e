"""Owns the spelling of matrices that a checkpoint holds as one above the other: q, k and v, or gate and up.

Phi's files have them so. Boxes name each by itself. Knows names and offsets, no data.
"""

import re
from collections.abc import Mapping

from ramet.srt.model_loader.checkpoint.safetensors_header import TensorInfo

FUSED = re.compile(r"(?P<prefix>.+)\.(?P<name>qkv_proj|gate_up_proj)\.(?P<kind>weight|bias|weight_scale(_inv)?)")
PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def split_fused(
    path: str, tensors: Mapping[str, TensorInfo], wanted: Mapping[str, tuple[int, ...]]
) -> dict[str, TensorInfo]:
    """The tensors of a file with each part of a fused one under its own name; others stay as they are.

    Args:
        wanted: names and shapes of the checkpoint tensors that the model has boxes for.

    Raises:
        ValueError: if the file holds a part in both spellings.
    """
    result: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        for new_name, part in _split(name, info, wanted).items():
            if new_name in result:
                raise ValueError(f"{path} has {new_name} twice: by itself and in a fused tensor")
            result[new_name] = part
    return result


def fused_parts(name: str) -> list[str]:
    """The names of the parts of a fused tensor, in the order in which their rows stand; empty for any other."""
    match = FUSED.fullmatch(name)
    return [f"{match['prefix']}.{part}.{match['kind']}" for part in PARTS[match["name"]]] if match is not None else []


def _split(name: str, info: TensorInfo, wanted: Mapping[str, tuple[int, ...]]) -> dict[str, TensorInfo]:
    names = fused_parts(name)
    if not names or name in wanted:
        return {name: info}
    rows = [wanted[part][0] for part in names if part in wanted]
    if len(rows) < len(names) or not info.shape or sum(rows) != info.shape[0]:
        return {name: info}
    row_nbytes, start, parts = info.nbytes // sum(rows), 0, {}
    for part, count in zip(names, rows, strict=True):
        shape = (count, *info.shape[1:])
        parts[part] = TensorInfo(info.dtype, shape, info.offset + start * row_nbytes, count * row_nbytes)
        start += count
    return parts
