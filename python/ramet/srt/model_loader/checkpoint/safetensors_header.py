"""Owns the safetensors container: finding a model's files and reading their headers. Reads no tensor data."""

import json
import math
import os
from dataclasses import dataclass
from typing import Any

from ramet.srt.model_loader.checkpoint.bare_decoder import whole_name
from ramet.srt.weights.boxes import contiguous_strides
from ramet.srt.weights.manifest import element_size

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
OTHER_WEIGHT_SUFFIXES = (".bin", ".pt", ".pth", ".gguf")
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_NUMBER = (1 << 63) - 1  # beside an extent of 0 any other one fits the bytes

# The format: https://github.com/huggingface/safetensors#format
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "float16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor in a file, or a part of one that is a tensor by itself."""

    dtype: str
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    nbytes: int  # of its elements, however far they reach
    strides: tuple[int, ...] | None = None  # bytes between neighbours along each dimension; None: row-major, no gaps

    @property
    def all_strides(self) -> tuple[int, ...]:
        """Bytes between neighbours along each dimension."""
        return contiguous_strides(self.shape, element_size(self.dtype)) if self.strides is None else self.strides

    @property
    def span_nbytes(self) -> int:
        """Bytes of the file from the first element to the end of the last one."""
        if self.strides is None:
            return self.nbytes
        reach = sum((extent - 1) * stride for extent, stride in zip(self.shape, self.strides, strict=True))
        return reach + element_size(self.dtype) if self.nbytes else 0

    def part(self, dim: int, start: int, stop: int) -> "TensorInfo":
        """What lies from `start` to `stop` of one dimension."""
        strides = self.all_strides
        shape = (*self.shape[:dim], stop - start, *self.shape[dim + 1 :])
        return _placed(self.dtype, shape, self.offset + start * strides[dim], strides)

    def matrix(self, index: int) -> "TensorInfo":
        """One matrix of a stack."""
        one = self.part(0, index, index + 1)
        return _placed(self.dtype, one.shape[1:], one.offset, one.all_strides[1:])

    def transposed(self) -> "TensorInfo":
        """A matrix, or each of a stack, with rows and columns exchanged."""
        shape, strides = self.shape, self.all_strides
        turned = (*shape[:-2], *shape[:-3:-1])
        return _placed(self.dtype, turned, self.offset, (*strides[:-2], *strides[:-3:-1]))


def _placed(dtype: str, shape: tuple[int, ...], offset: int, strides: tuple[int, ...]) -> TensorInfo:
    size = element_size(dtype)
    plain = contiguous_strides(shape, size)
    is_plain = all(a == b or extent == 1 for a, b, extent in zip(strides, plain, shape, strict=True))
    return TensorInfo(dtype, shape, offset, math.prod(shape) * size, None if is_plain else strides)


def find_checkpoint_files(folder: str) -> dict[str, set[str] | None]:
    """The safetensors files of a model folder: path -> names of the tensors that the index promises, if there is one.

    Args:
        folder: or the one file that is meant, of an adapter.

    Raises:
        ValueError: if there are none, or the index is broken or names a file that is missing.
    """
    if folder.endswith(".safetensors") and os.path.isfile(folder):
        return {folder: None}
    if os.path.isfile(folder):
        raise ValueError(f"{folder} is a file; a model folder is expected")
    if not os.path.isdir(folder):
        raise ValueError(f"there is no model folder {folder}")
    single = os.path.join(folder, SINGLE_FILE)
    if os.path.exists(single):
        return {single: None}
    index = os.path.join(folder, INDEX_FILE)
    if os.path.exists(index):
        return _read_index(folder, index)
    names = sorted(os.listdir(folder))
    files = [n for n in names if n.endswith(".safetensors") and not n.startswith(("consolidated", "adapter_"))]
    if not files:
        other = [n for n in names if n.endswith(OTHER_WEIGHT_SUFFIXES)]
        hint = f"; {other[0]} is of a format that is not read here" if other else ""
        raise ValueError(f"there are no weights in {folder}: no {SINGLE_FILE} or {INDEX_FILE}{hint}")
    return {os.path.join(folder, name): None for name in files}


def _read_index(folder: str, path: str) -> dict[str, set[str] | None]:
    try:
        with open(path, encoding="utf-8") as file:
            weight_map = json.load(file, object_pairs_hook=_unique)["weight_map"]
        pairs = [(str(tensor), str(name)) for tensor, name in weight_map.items()]
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise ValueError(f"{path} is not a safetensors index: {error!r}") from error
    if not pairs:
        raise ValueError(f"{path} names no tensors")
    files: dict[str, set[str] | None] = {}
    for tensor, name in pairs:
        if os.path.isabs(name) or ".." in name.split("/"):
            raise ValueError(f"{path}: {tensor} is said to be in {name!r}, outside the model folder")
        promised = files.setdefault(os.path.join(folder, name), set())
        assert promised is not None
        promised.add(whole_name(tensor))
    for file_path, promised in files.items():
        if not os.path.exists(file_path):
            example = min(promised or {"?"})
            raise ValueError(f"{file_path} is missing, though {INDEX_FILE} says that it has {example}")
    return files


def read_header(path: str) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file by their names in a whole model, all numbers checked against the file's size.

    Raises:
        ValueError: if the header is broken or a tensor reaches beyond the end of the file.
    """
    header, data_start, file_nbytes = _read_json(path)
    header.pop("__metadata__", None)
    tensors = {name: _read_tensor_info(path, name, fields, data_start, file_nbytes) for name, fields in header.items()}
    _check_no_overlap(path, tensors)
    whole = {whole_name(name): info for name, info in tensors.items()}
    if len(whole) < len(tensors):
        wholes = [whole_name(name) for name in tensors]
        twice = next(name for name in tensors if wholes.count(whole_name(name)) > 1)
        raise ValueError(f"{path} has {twice} twice, with and without model. or language_model. in front")
    return whole


def read_metadata(path: str) -> dict[str, str]:
    """What else the header of a safetensors file says: texts by their names.

    Raises:
        ValueError: if the header is broken.
    """
    metadata = _read_json(path)[0].get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError(f"{path}: broken safetensors header: __metadata__ is not an object of texts")
    return metadata


def _read_json(path: str) -> tuple[dict[str, Any], int, int]:
    """A file's header, the offset at which its data begin, and its bytes."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path} is no file")  # a pipe would be waited for
    try:
        with open(path, "rb") as file:
            file_nbytes = os.fstat(file.fileno()).st_size
            header_nbytes = int.from_bytes(file.read(8), "little")
            if file_nbytes < 8 or header_nbytes > min(MAX_HEADER_BYTES, file_nbytes - 8):
                raise ValueError(f"{path} is no safetensors file or is truncated: {file_nbytes} bytes long, "
                                 f"its header claims {header_nbytes}")  # fmt: skip
            text = file.read(header_nbytes)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    try:
        header = json.loads(text, object_pairs_hook=_unique)
        if not isinstance(header, dict):
            raise TypeError("the header is not an object")
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: broken safetensors header: {error}") from error
    return header, 8 + header_nbytes, file_nbytes


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose names are all different: of two with one name, readers take one or the other."""
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it names {next(name for name in names if names.count(name) > 1)} twice")
    return result


def _check_no_overlap(path: str, tensors: dict[str, TensorInfo]) -> None:
    last, end = "", 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if info.nbytes and info.offset < end:
            raise ValueError(f"{path}: {name} lies over {last}")
        if info.nbytes:
            last, end = name, info.offset + info.nbytes


def _read_tensor_info(path: str, name: str, fields: Any, data_start: int, file_nbytes: int) -> TensorInfo:
    try:
        code, shape, (start, stop) = fields["dtype"], fields["shape"], fields["data_offsets"]
        if not all(type(n) is int and 0 <= n <= MAX_NUMBER for n in (*shape, start, stop)):
            raise ValueError("negative, non-integer or huge numbers")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: broken header entry of {name}: {error!r}") from error
    dtype = DTYPES.get(code) if isinstance(code, str) else None
    if dtype is None:
        raise ValueError(f"{path}: {name} has the unknown dtype {code!r}")
    if stop - start != math.prod(shape) * element_size(dtype):
        raise ValueError(f"{path}: {name} of shape {tuple(shape)} {dtype} does not fit its {stop - start} bytes")
    if data_start + stop > file_nbytes:
        raise ValueError(
            f"{path} is truncated: {name} ends at byte {data_start + stop}, the file has {file_nbytes} bytes"
        )
    return TensorInfo(dtype, tuple(shape), data_start + start, stop - start)
