"""Owns what tells that the files of a checkpoint are still those that were looked at."""

import hashlib
import os

from ramet.srt.model_loader.checkpoint.safetensors_header import find_checkpoint_files
from ramet.srt.utils.net import host_identity
from ramet.srt.weights.update_messages import FileStamp

SAMPLE_BYTES = 4096
NUM_SAMPLES = 16  # of each file


def file_stamps(folder: str) -> list[FileStamp]:
    """Of the folder's weight files. Raises ValueError if it has no checkpoint."""
    return [file_stamp(path) for path in sorted(find_checkpoint_files(folder))]


def file_stamp(path: str) -> FileStamp:
    """Of one file. Raises ValueError if there is none."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    name = os.path.basename(path)
    return FileStamp(name, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


def check_stamps(where: str, stamps: list[FileStamp], told: list[FileStamp], told_by: str) -> None:
    """Raises ValueError unless files are those that the host with the identity `told_by` has looked at.

    Args:
        where: what to call them.
    """
    if told_by == host_identity():
        is_same = stamps == told
    else:
        is_same = [one.everywhere for one in stamps] == [one.everywhere for one in told]
    if not is_same:
        raise ValueError(f"the weights in {where} have changed, or are others than on the instance's first node")


def sample_files(folder: str) -> str:
    """A digest of some bytes of each of the folder's weight files, by which hosts can tell theirs apart.

    Two steps of a training differ nearly everywhere, and have the same names and sizes.

    Raises:
        ValueError: if there is no checkpoint, or it can't be read.
    """
    digest = hashlib.sha256()
    for path in sorted(find_checkpoint_files(folder)):
        try:
            with open(path, "rb", buffering=0) as file:
                last = max(0, os.fstat(file.fileno()).st_size - SAMPLE_BYTES)
                for index in range(NUM_SAMPLES):
                    digest.update(os.pread(file.fileno(), SAMPLE_BYTES, last * index // (NUM_SAMPLES - 1)))
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror}") from error
    return digest.hexdigest()
