"""Owns the spelling of matrices that a checkpoint holds as one: q, k and v, or gate and up.

Phi's files have them one above the other, and so whatever a quantised one is made of: in files that have it transposed,
one beside the other. Boxes name each by itself. Knows names and offsets, no data.
"""

import itertools
import math
import re
from collections.abc import Mapping

from ramet.srt.configs.weight_format import OF_COLUMNS
from ramet.srt.model_loader.checkpoint.safetensors_header import TensorInfo
from ramet.srt.model_loader.checkpoint.whole_model import SCALE_SUFFIXES

FUSED = re.compile(r"(?P<prefix>.+)\.(?P<name>qkv_proj|gate_up_proj)\.(?P<kind>\w+)")
OF_A_MATRIX = (*SCALE_SUFFIXES, "_scale_2")  # ends of names of scales that may be of a whole matrix
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
    found = [_like(info.shape, shape) for shape in shapes if shape is not None]
    if len(found) < len(names):
        return {name: info}
    if _is_of_all(name, info):
        return dict.fromkeys(names, info)
    dim = _seam(info.shape, found)
    if dim is None:
        return {name: info}
    rows = [wanted[part.removesuffix(suffix)][0] for part in names if part.removesuffix(suffix) in wanted]
    is_of_blocks = name.endswith(SCALE_SUFFIXES) and len(rows) == len(found) and rows != [shape[0] for shape in found]
    if is_of_blocks and (block_rows is None or any(count % block_rows for count in rows[:-1])):
        raise ValueError(
            f"{path}: {name} has the scales of {', '.join(names)}, one above the other, and a block of {block_rows} "
            "rows has some of two of them: such scales are not supported"
        )
    stops = list(itertools.accumulate(shape[dim] for shape in found))
    return {
        part: info.part(dim, stop - shape[dim], stop) for part, shape, stop in zip(names, found, stops, strict=True)
    }


def _is_of_all(name: str, info: TensorInfo) -> bool:
    """Whether a tensor says the same of each part: a scale of the whole matrix, or something of its columns."""
    return name.endswith(OF_COLUMNS) or (name.endswith(OF_A_MATRIX) and math.prod(info.shape) == 1)


def _like(whole: tuple[int, ...], part: tuple[int, ...]) -> tuple[int, ...]:
    """A part's shape as a vector where the whole is one: scales of rows."""
    return part[:1] if len(whole) == 1 and part[1:] == (1,) else part


def _seam(whole: tuple[int, ...], parts: list[tuple[int, ...]]) -> int | None:
    """The dimension along which tensors of these shapes make up the whole; None if they don't."""
    for dim, extent in enumerate(whole):
        rest = (*whole[:dim], *whole[dim + 1 :])
        if sum(part[dim] for part in parts if len(part) == len(whole)) == extent and all(
            (*part[:dim], *part[dim + 1 :]) == rest for part in parts
        ):
            return dim
    return None
