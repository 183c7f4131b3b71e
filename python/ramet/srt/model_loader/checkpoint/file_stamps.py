"""Owns what tells that the files of a checkpoint are still those that were looked at."""

import os

from ramet.srt.model_loader.checkpoint.safetensors_header import find_checkpoint_files
from ramet.srt.utils.net import host_identity
from ramet.srt.weights.update_messages import FileStamp


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
