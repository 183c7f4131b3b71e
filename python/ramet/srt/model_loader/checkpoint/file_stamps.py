"""Owns what tells that the files of a checkpoint are still those that were looked at."""

import os

from ramet.srt.model_loader.checkpoint.safetensors_header import find_checkpoint_files
from ramet.srt.weights.update_messages import FileStamp


def file_stamps(folder: str) -> list[FileStamp]:
    """Of the folder's weight files. Raises ValueError if it has no checkpoint."""
    stamps = []
    for path in sorted(find_checkpoint_files(folder)):
        try:
            status = os.stat(path)
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror}") from error
        name = os.path.basename(path)
        stamps.append(FileStamp(name, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino))
    return stamps
