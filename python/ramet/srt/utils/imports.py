"""Owns what is done about garbage collection around imports."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Import much in the block: Python searches none of it for garbage, neither meanwhile nor ever after.

    Without it a twelfth of torch's import is such searches, and each later one of the oldest generation goes through
    all of torch's objects.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
