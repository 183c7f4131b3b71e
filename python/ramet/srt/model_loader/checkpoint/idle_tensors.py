"""Owns tensors that change nothing if they hold what they hold in most files: read, and refused where they hold more.

GPTQ's tools write the group of every column, which only an order by activations makes more than a count, and older ones
a bias for every layer, of zeros where the model has none.
"""

import os
from collections.abc import Mapping

import numpy as np

from ramet.srt.configs.weight_format import WHOLE
from ramet.srt.model_loader.checkpoint.safetensors_header import TensorInfo
from ramet.srt.model_loader.checkpoint.whole_model import WholeModel

GROUPS, BIAS = ".g_idx", ".bias"


def without_idle(path: str, tensors: Mapping[str, TensorInfo], whole: WholeModel) -> dict[str, TensorInfo]:
    """A file's tensors but for those that say nothing.

    Raises:
        ValueError: if one of those says something after all; OSError if the file can't be read.
    """
    idle = [name for name in tensors if may_be_idle(name, whole)]
    if idle:
        with open(path, "rb", buffering=0) as file:
            for name in idle:
                info = tensors[name]
                check_idle(path, name, info, os.pread(file.fileno(), info.nbytes, info.offset), whole)
    return {name: info for name, info in tensors.items() if name not in set(idle)}


def may_be_idle(name: str, whole: WholeModel) -> bool:
    """Whether a tensor can be left out, if it says nothing."""
    if whole.quantization is None or whole.quantization.method not in ("gptq", "awq"):
        return False
    weight = name.removesuffix(GROUPS).removesuffix(BIAS) + whole.quantization.format.values.suffix
    return name.endswith((GROUPS, BIAS)) and name not in whole.shapes and weight in whole.quantised


def check_idle(path: str, name: str, info: TensorInfo, content: bytes, whole: WholeModel) -> None:
    """Raises ValueError if a tensor that can only be left out where it says nothing says something."""
    assert whole.quantization is not None
    group_columns = whole.quantization.format.scales.columns
    raw = np.frombuffer(content, np.uint8)
    if name.endswith(BIAS):
        if raw.any():
            raise ValueError(f"{path}: {name} is a bias that the model has no place for")
        return
    if info.dtype != "int32":
        raise ValueError(f"{path}: {name} is {info.dtype}, not int32")
    columns = np.arange(raw.size // 4)
    expected = columns * 0 if group_columns == WHOLE else columns // group_columns
    if not np.array_equal(raw.view("<i4"), expected):
        raise ValueError(f"{path}: {name} has columns in another order than their own, but the config says no desc_act")
