"""Owns what is done about the time of imports: kept bytecode, no search for garbage, a GPU that gets ready beside."""

import contextlib
import functools
import gc
import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Iterator

from ramet.srt.utils import cuda_driver

BYTECODE_FOLDER = "ramet/bytecode"  # in the user's cache


@contextlib.contextmanager
def importing(package: str) -> Iterator[None]:
    """Import `package`, or something that needs it, in the block.

    Python searches none of it for garbage, neither meanwhile nor ever after. Such searches are a tenth of torch's
    import, and each later one of the oldest generation would go through all of its objects.
    """
    _keep_bytecode(package)
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _keep_bytecode(package: str) -> None:
    """Have compiled modules kept in the user's cache, if nothing else keeps those of `package`.

    Container images often come without, and with PYTHONDONTWRITEBYTECODE set: each process would then compile the
    thousand modules of torch, which is half of its import. PYTHONPYCACHEPREFIX is respected.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None or sys.pycache_prefix is not None:
        return
    if os.path.exists(importlib.util.cache_from_source(spec.origin)):
        return
    if not sys.dont_write_bytecode and os.access(os.path.dirname(spec.origin), os.W_OK):
        return  # it will be kept where it belongs
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if os.path.isabs(cache) and _is_writable(folder := os.path.join(cache, BYTECODE_FOLDER)):  # no home: not absolute
        sys.pycache_prefix = folder
        sys.dont_write_bytecode = False


def _is_writable(folder: str) -> bool:
    """Whether files can be kept there. Otherwise what has bytecode beside it would be compiled each time too."""
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def start_gpu(gpu_id: int) -> None:
    """Have a thread do what needs no torch and not Python's lock, if there is a driver, so before torch is imported.

    The GPU's context is made, and Triton hashes its own files, which it does in each process for the keys of its cache.
    What goes wrong, torch finds out again.
    """
    if not cuda_driver.is_installed():
        return
    jobs: list[Callable[[], object]] = [functools.partial(cuda_driver.retain_primary_context, gpu_id)]
    with contextlib.suppress(ImportError):  # here, since no two threads should import at once
        from triton.runtime.cache import triton_key

        jobs.append(triton_key)

    def work() -> None:
        for job in jobs:
            with contextlib.suppress(OSError):
                job()

    threading.Thread(target=work, name="start-gpu", daemon=True).start()
