"""Owns the question whether files hold an output head of their own where the config says that it is the embedding's."""

import functools
import os

from ramet.srt.model_loader.checkpoint.checks import Tensors
from ramet.srt.model_loader.checkpoint.safetensors_header import TensorInfo, find_checkpoint_files, read_header
from ramet.srt.model_loader.checkpoint.whole_model import EMBEDDING, HEAD

BLOCK_BYTES = 8 << 20


def folder_has_own_head(folder: str) -> bool:
    """Whether the files in a folder hold another output head than the embedding; see `has_own_head`.

    Raises:
        ValueError: if they can't be read.
    """
    tensors: dict[str, tuple[str, TensorInfo]] = {}
    for path in find_checkpoint_files(folder):
        tensors |= {name: (path, info) for name, info in read_header(path).items() if name in (HEAD, EMBEDDING)}
    return has_own_head(tensors)


def has_own_head(tensors: Tensors) -> bool:
    """Whether there is an lm_head.weight that differs from the embedding's table: then transformers doesn't tie them.

    Both are read once, up to the first difference, and only if both are there.

    Raises:
        ValueError: if a file can't be read.
    """
    head, embedding = tensors.get(HEAD), tensors.get(EMBEDDING)
    if head is None or embedding is None:
        return False
    if (head[1].dtype, head[1].shape) != (embedding[1].dtype, embedding[1].shape):
        return True
    try:
        return _differ(*head, *embedding, _version(head[0]), _version(embedding[0]))
    except OSError as error:
        raise ValueError(f"cannot read {error.filename or head[0]}: {error.strerror or error}") from error


def _version(path: str) -> tuple[int, int, int]:
    found = os.stat(path)
    return found.st_ino, found.st_size, found.st_mtime_ns


@functools.lru_cache(maxsize=4)  # asked before the model is built, and again when it is read
def _differ(path: str, info: TensorInfo, other_path: str, other: TensorInfo, *_versions: tuple[int, int, int]) -> bool:
    with open(path, "rb", buffering=0) as one, open(other_path, "rb", buffering=0) as two:
        for start in range(0, info.nbytes, BLOCK_BYTES):
            count = min(BLOCK_BYTES, info.nbytes - start)
            if os.pread(one.fileno(), count, info.offset + start) != os.pread(
                two.fileno(), count, other.offset + start
            ):
                return True
    return False
