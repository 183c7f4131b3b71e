"""Makes kernels for CPUs available to tests: built once for all of them, in the user's cache."""

import pytest
from ramet.srt.layers.cpu_kernels import build, library

THREADS = 2


@pytest.fixture
def cpu_kernels(monkeypatch):
    """The library is in use for the length of a test."""
    if build.find_compiler() is None:
        pytest.skip("there is no C++ compiler")
    monkeypatch.setattr(library, "_library", None)
    library.load(build.build(), THREADS)
    assert library.library() is not None
    return library.library()
