"""What imports compile is kept and not searched for garbage; beside a rank's imports a GPU's context is made."""

import gc
import os
import py_compile
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from ramet.srt.utils import cuda_driver
from ramet.srt.utils.imports import importing, start_gpu

IMPORT = """
import sys
from ramet.srt.utils.imports import importing
with importing("heavy"):
    import heavy
print(heavy.__cached__)
"""


@pytest.fixture
def retained(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The GPUs whose context was asked for, with a driver that is there and refuses."""
    gpus: list[int] = []

    def retain(gpu_id: int) -> None:
        gpus.append(gpu_id)
        raise OSError("no such device")

    monkeypatch.setattr(cuda_driver, "is_installed", lambda: True)
    monkeypatch.setattr(cuda_driver, "retain_primary_context", retain)
    yield gpus
    for thread in threading.enumerate():
        if thread.name == "start-gpu":
            thread.join(30)


def test_what_was_imported_is_never_searched_for_garbage() -> None:
    frozen = gc.get_freeze_count()
    try:
        with pytest.raises(ImportError), importing("no_such_package"):
            assert not gc.isenabled()
            kept = [[number] for number in range(1000)]
            raise ImportError
        assert gc.isenabled()
        assert gc.get_freeze_count() >= frozen + len(kept)
    finally:
        gc.unfreeze()


def test_a_gpu_that_refuses_is_left_to_torch(retained: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    failures: list[object] = []
    monkeypatch.setattr(threading, "excepthook", failures.append)
    start_gpu(3)
    for thread in threading.enumerate():
        if thread.name == "start-gpu":
            thread.join(30)
    assert retained == [3]
    assert not failures


def test_without_a_driver_nothing_is_started(monkeypatch: pytest.MonkeyPatch, retained: list[int]) -> None:
    monkeypatch.setattr(cuda_driver, "is_installed", lambda: False)
    start_gpu(0)
    assert retained == []
    assert "start-gpu" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize(
    "case", ["no bytecode", "has bytecode", "a folder of the user's", "no place", "may be written"]
)
def test_bytecode_is_kept_where_an_image_has_none(tmp_path: Path, case: str) -> None:
    package = tmp_path / "heavy"
    package.mkdir()
    (package / "__init__.py").write_text("VALUE = 1\n")
    beside = package / "__pycache__" / f"__init__.{sys.implementation.cache_tag}.pyc"
    if case == "has bytecode":
        py_compile.compile(str(package / "__init__.py"), str(beside))
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), *sys.path])
    if case == "a folder of the user's":
        environment["PYTHONPYCACHEPREFIX"] = str(tmp_path / "own")
    if case == "no place":
        (tmp_path / "cache").touch()
    if case == "may be written":
        del environment["PYTHONDONTWRITEBYTECODE"]
    done = subprocess.run([sys.executable, "-c", IMPORT], env=environment, capture_output=True, text=True, timeout=60)
    kept = Path(done.stdout.strip())
    assert kept.exists() == (case not in ("a folder of the user's", "no place")), (
        done.stderr
    )  # Python may not write there
    folder = {"no bytecode": "cache/ramet/bytecode", "a folder of the user's": "own"}.get(case, "heavy/__pycache__")
    assert kept.is_relative_to(tmp_path / folder)
