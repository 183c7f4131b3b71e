"""Owns the spelling of matrices that a checkpoint holds as one above the other: q, k and v, or gate and up.

Phi's files have them so. Boxes name each by itself. Knows names and offsets, no data.
"""

import math
import re
from collections.abc import Mapping

from ramet.srt.model_loader.checkpoint.safetensors_header import TensorInfo
from ramet.srt.model_loader.checkpoint.whole_model import SCALE_SUFFIXES

FUSED = re.compile(r"(?P<prefix>.+)\.(?P<name>qkv_proj|gate_up_proj)\.(?P<kind>weight|bias|weight_scale(_inv)?)")
PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def split_fused(
    path: str,
    tensors: Mapping[str, TensorInfo],
    wanted: Mapping[str, tuple[int, ...]],
    block_rows: int | None = None,
) -> dict[str, TensorInfo]:
    """The tensors of a file with each part of a fused one under its own name; others stay as they are.

    Args:
        wanted: names and shapes of the checkpoint tensors that the model has boxes for.
        block_rows: of fp8 weights with scales of blocks, of which none may reach from one part into the next.

    Raises:
        ValueError: if the file holds a part in both spellings, or such a block.
    """
    result: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        for new_name, part in _split(path, name, info, wanted, block_rows).items():
            if new_name in result:
                raise ValueError(f"{path} has {new_name} twice: by itself and in a fused tensor")
            result[new_name] = part
    return result


def fused_parts(name: str) -> list[str]:
    """The names of the parts of a fused tensor, in the order in which their rows stand; empty for any other."""
    match = FUSED.fullmatch(name)
    return [f"{match['prefix']}.{part}.{match['kind']}" for part in PARTS[match["name"]]] if match is not None else []


def _split(
    path: str, name: str, info: TensorInfo, wanted: Mapping[str, tuple[int, ...]], block_rows: int | None
) -> dict[str, TensorInfo]:
    names = fused_parts(name)
    if not names or name in wanted:
        return {name: info}
    suffix, other = SCALE_SUFFIXES if name.endswith(SCALE_SUFFIXES[0]) else reversed(SCALE_SUFFIXES)
    shapes = [wanted.get(part, wanted.get(part.removesuffix(suffix) + other)) for part in names]
    rows = [shape[0] for shape in shapes if shape is not None]
    if len(rows) < len(names):
        return {name: info}
    if name.endswith(SCALE_SUFFIXES) and math.prod(info.shape) == 1:  # of the whole matrix, and so of each part
        return dict.fromkeys(names, info)
    if not info.shape or sum(rows) != info.shape[0]:
        return {name: info}
    weights = [wanted.get(part.removesuffix(suffix), (0,))[0] for part in names]
    is_grid = name.endswith(SCALE_SUFFIXES) and rows != weights  # of blocks
    if is_grid and (block_rows is None or any(count % block_rows for count in weights[:-1])):
        raise ValueError(
            f"{path}: {name} has the scales of {', '.join(names)}, one above the other, and a block of {block_rows} "
            "rows has some of two of them: such scales are not supported"
        )
    row_nbytes, start, parts = info.nbytes // sum(rows), 0, {}
    for part, count in zip(names, rows, strict=True):
        shape = (count, *info.shape[1:])
        parts[part] = TensorInfo(info.dtype, shape, info.offset + start * row_nbytes, count * row_nbytes)
        start += count
    return parts
