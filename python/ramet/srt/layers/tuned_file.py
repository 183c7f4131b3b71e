"""Owns the files that keep what was measured of kernels: their format, which of them a process takes, and writing one.

A file is of one GPU model, and of one version of torch, of Triton and of Ramet's kernels. It can be shipped: instances
read those in a user's cache and those in a folder that they are given, whose entries go before.
"""

import functools
import hashlib
import importlib.metadata
import logging
import os
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec
import torch

from ramet.srt.environ import cache_folder, envs
from ramet.srt.errors import one_line
from ramet.srt.layers.kernels.choices import CHOICES, KERNELS_VERSION, Key, Value
from ramet.srt.layers.kernels.runtime import has_triton

logger = logging.getLogger(__name__)

FORMAT = 1
MAX_BYTES = 16 << 20
Measured = dict[tuple[str, Key], "Entry"]


class Stamp(msgspec.Struct, frozen=True):
    """Where and with what it was measured: elsewhere it says nothing."""

    device: str
    torch: str
    triton: str
    kernels: int


class Entry(msgspec.Struct, frozen=True):
    """One choice for one shape."""

    choice: str
    key: dict[str, int]
    value: Value
    us: float  # what it takes
    default_us: float  # what the default takes, in the same run


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: int
    stamp: Stamp
    entries: list[Entry]
    digest: str  # of stamp and entries: a file that was cut or changed by hand is not taken


class _Head(msgspec.Struct, frozen=True):
    """What a file of any format has."""

    format: int


@functools.cache
def stamp_of(device: torch.device) -> Stamp:
    """This process's, on a device."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    triton = importlib.metadata.version("triton") if has_triton() else ""
    return Stamp(name, str(torch.__version__), triton, KERNELS_VERSION)


def _processor() -> str:
    """The processor's name and the threads that multiply: what is faster depends on both."""
    name = "CPU"
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            name = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), name)
    except OSError:
        pass
    return f"{name}, {torch.get_num_threads()} threads"


def user_folder() -> Path:
    """Where `ramet tune` keeps what it measures."""
    return cache_folder("tuning", envs.RAMET_TUNING_DIR)


def load_measured(given: str | None, device: torch.device) -> dict[tuple[str, Key], Value]:
    """What the user's files and those of a given folder say for this device. Nothing in them is an error.

    Args:
        given: a folder whose entries go before the user's own; that it is there was checked before.
    """
    stamp = stamp_of(device)
    measured: Measured = {}
    for folder in (str(user_folder()), *([] if given is None else [given])):
        for path in sorted(Path(folder).glob("*.json")):
            measured |= _take(path, stamp)
    if measured:
        logger.info("kernels: %d choices were measured on %s", len(measured), stamp.device)
    return {place: entry.value for place, entry in measured.items()}


def _take(path: Path, stamp: Stamp) -> Measured:
    """What a file has for this process; a line says what is not taken, and why."""
    try:
        return read_measured(path, stamp)
    except ForeignFileError as error:
        logger.info("%s is not taken: %s", path, error)
    except ValueError as error:
        logger.warning("%s is not taken: %s", path, error)
    return {}


class ForeignFileError(ValueError):
    """A file is of another device or version."""


def read_measured(path: Path, stamp: Stamp) -> Measured:
    """A file's entries.

    Raises:
        ForeignFileError: if it is not of this device and these versions.
        ValueError: if it can't be read, or has been changed.
    """
    try:
        status = path.stat()
        if status.st_uid not in (0, os.geteuid()):
            raise ValueError("it belongs to another user")
        if status.st_size > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES >> 20} MB")
        data = path.read_bytes()
        version = msgspec.json.decode(data, type=_Head).format
        if version != FORMAT:
            raise ForeignFileError(f"it has format {version}, not {FORMAT}")
        file = msgspec.json.decode(data, type=_File)
    except OSError as error:
        raise ValueError(one_line(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"it is no file of `ramet tune`: {one_line(error)}") from error
    if file.digest != _digest(file.stamp, file.entries):
        raise ValueError("it has been changed since it was measured: run `ramet tune` again")
    for name in Stamp.__struct_fields__:
        there, here = getattr(file.stamp, name), getattr(stamp, name)
        if there != here:
            raise ForeignFileError(f"it was measured with {name} {there!r}, here it is {here!r}")
    return {(entry.choice, _key_of(entry)): entry for entry in file.entries}


def _key_of(entry: Entry) -> Key:
    """Raises ValueError if there is no such choice, shape or value."""
    choice = CHOICES.get(entry.choice)
    if choice is None:
        raise ValueError(f"there is no choice {entry.choice!r}")
    if set(entry.key) != set(choice.key):
        raise ValueError(f"the shapes of {choice.name!r} have {', '.join(choice.key)}, not {', '.join(entry.key)}")
    if entry.value not in choice.values:
        raise ValueError(f"{choice.name!r} can't be {list(entry.value)}")
    return tuple(entry.key[name] for name in choice.key)


def make_entry(name: str, key: Key, value: Value, us: float, default_us: float) -> Entry:
    return Entry(name, dict(zip(CHOICES[name].key, key, strict=True)), value, round(us, 2), round(default_us, 2))


def write_measured(path: Path, stamp: Stamp, entries: Iterable[Entry], tuned: Sequence[tuple[str, Key]]) -> int:
    """Put entries into a file, in one step: beside those that are there, if they are of the same stamp.

    Args:
        tuned: all shapes that were measured: what the file had for them goes.

    Returns:
        The number of entries that the file has now.

    Raises:
        OSError: if it can't be written.
    """
    kept: Measured = {}
    if path.exists():
        try:
            kept = read_measured(path, stamp)
        except ValueError as error:
            logger.warning("%s is written anew: %s", path, error)
    for place in tuned:
        kept.pop(place, None)
    kept |= {(entry.choice, _key_of(entry)): entry for entry in entries}
    ordered = [kept[place] for place in sorted(kept)]
    file = _File(FORMAT, stamp, ordered, _digest(stamp, ordered))
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(msgspec.json.format(msgspec.json.encode(file), indent=1))
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return len(ordered)


def file_name(stamp: Stamp) -> str:
    """What files of a stamp are called: each has its own, so that one folder can be shipped for all."""
    device = re.sub(r"[^a-z0-9]+", "-", stamp.device.lower()).strip("-")
    rest = hashlib.sha256(msgspec.json.encode(stamp)).hexdigest()[:8]
    return f"{device}-{rest}.json"


def digest_of(measured: Mapping[tuple[str, Key], Value]) -> bytes:
    """The same for ranks that choose alike."""
    return hashlib.sha256(repr(sorted(measured.items())).encode()).digest()


def _digest(stamp: Stamp, entries: Sequence[Entry]) -> str:
    return hashlib.sha256(msgspec.json.encode((stamp, entries))).hexdigest()
