"""Owns the digest of a checkpoint's content, and the table of hashes behind it by which a part of it can be checked.

A tensor of n dimensions is a stack of matrices (its last two dimensions; one row for each element of a vector). Each
matrix is cut into bands of rows, and once more into bands of columns, wherever an engine of some tensor-parallel size
cuts it. Every band has a hash. So whoever holds whole bands can check them, whatever the topology, against a table
whose own hash is the digest: the table may come from anybody.

The digest is the SHA-256 of PREFIX and, for each tensor in the order of their UTF-8 names, of the SHA-256 of
`[name,dtype,[shape]]` as compact JSON, the SHA-256 of its row bands' hashes and the SHA-256 of its column bands'
hashes. A band's hash is the first 16 bytes of the SHA-256 of its elements in row-major order.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from ramet.srt.weights.manifest import DTYPE_BYTES

PREFIX = b"ramet-weights-1\n"
PIECE_BYTES = 16  # of a band's hash
SIZES = (2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16)  # of tensor parallelism
VOCAB_PADDING = 64  # rows; tables are padded to a multiple of it before they are cut
GRIDS = ("_scale", "_scale_inv", "_scales", ".scales", "_zero_point", ".qzeros")  # ends of names of scales and zeros
BLOCKS = "_blocks"  # end of the name of gpt-oss's stacks of values, whose last two dimensions are one row
MAX_GRID = 1024  # rows of a grid of scales that is cut at each of them; columns too
MAX_PART_BYTES = 8 << 20  # of one answer
MAX_TENSORS = 1_000_000
MAX_BANDS = 1 << 24  # of one tensor

Band = tuple[int, int]  # (start, stop)


class TensorDigest(msgspec.Struct, frozen=True, array_like=True):
    """One tensor in a table."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    rows: bytes  # PIECE_BYTES for each row band of the first matrix, then of the next one
    columns: bytes  # the same for column bands; empty for vectors and where there is one band


class DigestTable(msgspec.Struct, frozen=True):
    """The hashes of all tensors of a checkpoint, by name."""

    digest: str  # 64 hex digits
    tensors: dict[str, TensorDigest]


def build_table(tensors: Iterable[TensorDigest]) -> DigestTable:
    """The table of these tensors.

    Raises:
        ValueError: if a name comes twice, or hashes don't fit a tensor's shape.
    """
    known: dict[str, TensorDigest] = {}
    for tensor in tensors:
        if tensor.name in known:
            raise ValueError(f"{tensor.name} comes twice")
        if len(known) == MAX_TENSORS:
            raise ValueError(f"there are more than {MAX_TENSORS} tensors")
        _check(tensor)
        known[tensor.name] = tensor
    root = hashlib.sha256(PREFIX)
    for name in sorted(known, key=lambda name: name.encode("utf-8", "surrogatepass")):
        root.update(_leaf(known[name]))
    return DigestTable(root.hexdigest(), known)


def _leaf(tensor: TensorDigest) -> bytes:
    head = json.dumps([tensor.name, tensor.dtype, list(tensor.shape)], separators=(",", ":"), ensure_ascii=False)
    leaf = hashlib.sha256(head.encode("utf-8", "surrogatepass"))
    leaf.update(hashlib.sha256(tensor.rows).digest())
    leaf.update(hashlib.sha256(tensor.columns).digest())
    return leaf.digest()


def _check(tensor: TensorDigest) -> None:
    if tensor.dtype not in DTYPE_BYTES or any(extent < 0 for extent in tensor.shape):
        raise ValueError(f"{tensor.name} is {tensor.dtype} {tensor.shape}, which is no tensor")
    matrices = as_matrices(tensor.shape)[0]
    num_bands = [len(bands) * matrices for bands in bands_of(tensor.name, tensor.shape)]
    if max(num_bands) > MAX_BANDS:
        raise ValueError(f"{tensor.name} has more than {MAX_BANDS} bands")
    expected = [count * PIECE_BYTES for count in num_bands] if math.prod(tensor.shape) else [0, 0]
    if [len(tensor.rows), len(tensor.columns)] != expected:
        raise ValueError(f"{tensor.name}: {len(tensor.rows)} and {len(tensor.columns)} bytes of hashes, not {expected}")


def digest_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A tensor's shape in tables: as in files, but for rows that those cut into blocks."""
    is_cut = len(shape) == 4 and name.endswith(BLOCKS)
    return (*shape[:2], shape[2] * shape[3]) if is_cut else shape


def as_matrices(shape: Sequence[int]) -> tuple[int, int, int]:
    """Number of matrices, their rows and their columns."""
    if len(shape) < 2:
        return 1, math.prod(shape), 1
    return math.prod(shape[:-2]), shape[-2], shape[-1]


def bands_of(name: str, shape: Sequence[int]) -> tuple[list[Band], list[Band]]:
    """The bands of rows and of columns of each matrix of a tensor.

    Each scale of a grid, one for each block or group of a matrix, is in a row or a column of its own: a rank whose part
    ends within a block has that block's scale, so that its part of the grid ends where no part of the matrix does.
    """
    _, num_rows, num_columns = as_matrices(shape)
    rows, columns = row_bands(num_rows), column_bands(shape)
    if len(shape) > 1 and num_columns > 1 and name.endswith(GRIDS):
        if num_rows <= MAX_GRID:
            rows = [(index, index + 1) for index in range(num_rows)]
        if num_columns <= MAX_GRID:
            columns = [(index, index + 1) for index in range(num_columns)]
    return rows, columns


def row_bands(num_rows: int) -> list[Band]:
    """The bands of rows of a matrix, or of elements of a vector."""
    cuts = _even_cuts(num_rows)
    if num_rows % VOCAB_PADDING:
        padded = -(-num_rows // VOCAB_PADDING) * VOCAB_PADDING
        for size in SIZES:
            rows = -(-padded // size)
            cuts.update(range(rows, num_rows, rows))
    return _bands(cuts, num_rows)


def column_bands(shape: Sequence[int]) -> list[Band]:
    """The bands of columns of a tensor's matrices; none where there would be only one, which says what rows say."""
    if len(shape) < 2:
        return []
    bands = _bands(_even_cuts(shape[-1]), shape[-1])
    return bands if len(bands) > 1 else []


def _even_cuts(extent: int) -> set[int]:
    return {cut for size in SIZES if extent and extent % size == 0 for cut in range(0, extent, extent // size)}


def _bands(cuts: Iterable[int], extent: int) -> list[Band]:
    edges = sorted({0, extent, *cuts})
    return list(zip(edges, edges[1:], strict=False))


def piece(hashes: bytes, index: int) -> bytes:
    """The hash of the band with that index."""
    return hashes[index * PIECE_BYTES : (index + 1) * PIECE_BYTES]


def parse_digest(text: str, what: str) -> str:
    """A digest in lower case. Raises ValueError, beginning with `what`, for anything but 64 hex digits."""
    if not re.fullmatch(r"[0-9a-fA-F]{64}", text):
        raise ValueError(f"{what} must be 64 hex digits, as ramet digest prints them; got {text[:100]!r}")
    return text.lower()


def part_of_table(table: DigestTable | None, first: int) -> dict[str, Any]:
    """What is handed on of a table in one answer: tensors from an index on, in the order of their names.

    Raises:
        ValueError: if the index is negative.
    """
    if first < 0:
        raise ValueError(f"first must not be negative; got {first}")
    if table is None:
        return {"num_tensors": 0, "tensors": b""}
    names = sorted(table.tensors)
    part: list[TensorDigest] = []
    nbytes = 0
    for name in names[first:]:
        tensor = table.tensors[name]
        nbytes += len(name) + len(tensor.rows) + len(tensor.columns)
        if part and nbytes > MAX_PART_BYTES:
            break
        part.append(tensor)
    return {"num_tensors": len(names), "tensors": encode_tensors(part)}


def encode_tensors(tensors: Sequence[TensorDigest]) -> bytes:
    """For a file, or for others."""
    return msgspec.msgpack.encode(tensors)


def decode_tensors(data: bytes) -> list[TensorDigest]:
    """Raises ValueError if `data` is something else."""
    return msgspec.msgpack.decode(data, type=list[TensorDigest])
