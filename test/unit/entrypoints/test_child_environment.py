"""What the children of an instance find in their environment."""

import os

import pytest
from ramet.srt.entrypoints.child_processes import child_environment
from ramet.srt.managers.child_process import send_status


def test_waiting_threads_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    assert child_environment("here")["GOMP_SPINCOUNT"] == "1000"
    assert child_environment("here")["PYTHONPATH"] == "here"


@pytest.mark.parametrize(("name", "value"), [("OMP_WAIT_POLICY", "ACTIVE"), ("GOMP_SPINCOUNT", "7")])
def test_the_users_choice_stands(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    for known in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(known, raising=False)
    monkeypatch.setenv(name, value)
    found = child_environment("here")
    assert {known: found[known] for known in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT") if known in found} == {name: value}


def test_what_is_compiled_for_each_number_of_rows_is_bounded(monkeypatch):
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    found = child_environment("here")
    assert (found["ONEDNN_PRIMITIVE_CACHE_CAPACITY"], found["LRU_CACHE_CAPACITY"]) == ("256", "7")


def test_a_status_that_nobody_reads_any_more_is_no_error():
    """An instance ends when its first rank fails; others that fail in the same moment say so to nobody."""
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    send_status(write_fd, b"failed")
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(write_fd)
