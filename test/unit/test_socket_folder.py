"""The folder for an instance's sockets goes with the instance, however that ends, and nobody else's goes."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from ramet.srt.utils import socket_folder
from ramet.srt.utils.socket_folder import PREFIX, SocketFolder, remove_abandoned_folders
from server_process import PYTHON_FOLDER

OWNER = """
import pathlib, sys
from ramet.srt.utils.socket_folder import SocketFolder
folder = SocketFolder()
pathlib.Path(folder.path, "socket").touch()
print(folder.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def owner(temporary: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process that has a folder, and that folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": str(PYTHON_FOLDER), "TMPDIR": str(temporary), "PATH": "/usr/bin:/bin"},
    )
    assert process.stdout is not None
    yield process, Path(process.stdout.readline().strip())
    process.kill()
    process.communicate()


def test_only_this_user_may_enter_and_it_goes_at_the_end(temporary: Path) -> None:
    folder = SocketFolder()
    assert [str(path) for path in temporary.iterdir()] == [folder.path]
    assert os.stat(folder.path).st_mode & 0o777 == 0o700
    folder.close()
    folder.close()
    assert not list(temporary.iterdir())


def test_the_folder_of_a_killed_instance_goes_with_the_next_start(
    owner: tuple[subprocess.Popen[str], Path], temporary: Path
) -> None:
    process, path = owner
    remove_abandoned_folders()
    assert list(path.iterdir())  # it lives
    process.kill()
    process.wait()
    assert path.exists()
    folder = SocketFolder()
    assert [str(path) for path in temporary.iterdir()] == [folder.path]
    folder.close()


def test_what_is_not_such_a_folder_stays(
    temporary: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "mine").touch()
    for name in ("ramet-demo-12345678", f"{PREFIX}mine", f"{PREFIX}mine-too", f"{PREFIX}12345678.old"):
        (temporary / name).mkdir(0o700)
    (temporary / f"{PREFIX}12345678").touch()
    (temporary / f"{PREFIX}1234567_").symlink_to(elsewhere)
    (temporary / f"{PREFIX}123456__").mkdir(0o755)
    before = sorted(temporary.iterdir())
    remove_abandoned_folders()
    assert sorted(temporary.iterdir()) == before and list(elsewhere.iterdir())
    (temporary / f"{PREFIX}otheruse").mkdir(0o700)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    remove_abandoned_folders()
    assert len(list(temporary.iterdir())) == len(before) + 1
    monkeypatch.undo()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    remove_abandoned_folders()
    assert sorted(temporary.iterdir()) == before


def test_a_start_that_loses_its_folder_before_it_holds_it_makes_another(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, losses = socket_folder._lock, []

    def lose_first(fd: int) -> bool:
        if not losses:
            losses.append(next(temporary.iterdir()))
            losses[0].rmdir()
        return lock(fd)

    monkeypatch.setattr(socket_folder, "_lock", lose_first)
    folder = SocketFolder()
    assert Path(folder.path).is_dir() and folder.path != str(losses[0])
    folder.close()


def test_nor_does_it_matter_when_the_folder_is_lost_at_once(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, losses = tempfile.mkdtemp, []

    def make_and_lose_first(prefix: str) -> str:
        path = make(prefix=prefix)
        if not losses:
            losses.append(path)
            Path(path).rmdir()
        return path

    monkeypatch.setattr(socket_folder.tempfile, "mkdtemp", make_and_lose_first)
    folder = SocketFolder()
    assert Path(folder.path).is_dir() and folder.path != losses[0]
    folder.close()
