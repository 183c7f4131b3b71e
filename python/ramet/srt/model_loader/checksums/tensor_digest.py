"""Owns the hashes of one whole tensor's bands, for the table of a checkpoint's digest. Knows no files and no arena."""

import hashlib
import math

import numpy as np

from ramet.srt.weights.content_digest import PIECE_BYTES, TensorDigest, as_matrices, bands_of, digest_shape
from ramet.srt.weights.manifest import element_size

BLOCK_BYTES = 4 << 20  # of rows whose columns are hashed before the next ones are looked at


def digest_tensor(name: str, dtype: str, shape: tuple[int, ...], data: memoryview) -> TensorDigest:
    """The hashes of a tensor.

    Args:
        data: its elements in row-major order, as bytes.
    """
    shape = digest_shape(name, shape)
    if not math.prod(shape):
        return TensorDigest(name, dtype, shape, b"", b"")
    matrices, num_rows, num_columns = as_matrices(shape)
    size = element_size(dtype)
    row_nbytes = num_columns * size
    stack = np.frombuffer(data, np.uint8).reshape(matrices, num_rows, row_nbytes)
    rows, columns = [], []
    bands_of_rows, bands_of_columns = bands_of(name, shape)
    for matrix in stack:
        rows += [hash_bytes(matrix[start:stop]) for start, stop in bands_of_rows]
        bands = [(start * size, stop * size) for start, stop in bands_of_columns]
        hashers = [hashlib.sha256() for _ in bands]
        step = max(1, BLOCK_BYTES // row_nbytes)
        for first in range(0, num_rows if bands else 0, step):
            block = matrix[first : first + step]
            for hasher, (start, stop) in zip(hashers, bands, strict=True):
                hasher.update(np.ascontiguousarray(block[:, start:stop]).data)
        columns += [hasher.digest()[:PIECE_BYTES] for hasher in hashers]
    return TensorDigest(name, dtype, shape, b"".join(rows), b"".join(columns))


def hash_bytes(array: np.ndarray) -> bytes:
    """The hash of a band. Runs without the GIL where the band is large.

    Args:
        array: of uint8; hashed in row-major order.
    """
    return hashlib.sha256(np.ascontiguousarray(array).data).digest()[:PIECE_BYTES]
