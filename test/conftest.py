"""Owns what holds for all tests: one thread for each process that computes, little work for a call, clean caches."""

import atexit
import contextlib
import functools
import os
import shutil
import sys
import tempfile
from collections.abc import Generator
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
for cache in ("RAMET_DIGEST_DIR", "RAMET_TUNING_DIR"):
    if cache not in os.environ:
        os.environ[cache] = tempfile.mkdtemp(prefix="ramet-cache-")
        atexit.register(shutil.rmtree, os.environ[cache], ignore_errors=True)

# Each call without a client, so each look whether a server is ready, would read all authorities' certificates anew.
with contextlib.suppress(ImportError):  # not every test needs httpx
    from httpx._transports import default as httpx_transports

    httpx_transports.create_ssl_context = functools.cache(httpx_transports.create_ssl_context)


def _kernels_as_before() -> Generator[None]:
    """A test computes with the kernels for CPUs if it starts what loads them, whichever tests came before it."""
    library = sys.modules.get("ramet.srt.layers.cpu_kernels.library")
    before = (None, False) if library is None else (library._library, library._begun)
    yield
    if (library := sys.modules.get("ramet.srt.layers.cpu_kernels.library")) is not None:
        library._library, library._begun = before


kernels_as_before_test = pytest.fixture(autouse=True)(_kernels_as_before)
kernels_as_before_module = pytest.fixture(autouse=True, scope="module")(_kernels_as_before)


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Generator[None, Any, Any]:
    """Tests speak of texts that are no Unicode; a process that runs tests beside others can't send them to pytest's."""
    return _encodable((yield))


def _encodable(value: Any) -> Any:
    """The same with "\\ud800" for such a character."""
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    if isinstance(value, dict):
        return {_encodable(key): _encodable(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_encodable(one) for one in value]
    return tuple(map(_encodable, value)) if isinstance(value, tuple) else value
