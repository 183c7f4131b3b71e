"""Owns what is done about the time that imports take: no search for garbage, and a GPU that gets ready beside them."""

import contextlib
import functools
import gc
import threading
from collections.abc import Callable, Iterator

from ramet.srt.model_loader import cuda_driver


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Import much in the block: Python searches none of it for garbage, neither meanwhile nor ever after.

    Such searches are a tenth of torch's import, and each later one of the oldest generation would go through all of
    its objects.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


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
