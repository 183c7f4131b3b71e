"""Beside a rank's imports nothing is searched for garbage, and a GPU's context is made if there is one."""

import gc
import threading
from collections.abc import Iterator

import pytest
from ramet.srt.model_loader import cuda_driver
from ramet.srt.utils.imports import importing, start_gpu


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
        with pytest.raises(ImportError), importing():
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
