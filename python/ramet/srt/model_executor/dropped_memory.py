"""Owns the memory of what a rank has dropped until it is free: pinned memory takes seconds, and passes go on."""

import threading
from typing import Any


class DroppedMemory:
    """Frees in threads for which the end of the process does not wait: with the process all of it goes anyway."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._num_left = 0

    def free(self, held: list[Any]) -> None:
        """Let go of what a list holds, which nobody else does, in a thread; the list is empty afterwards."""
        if not held:
            return
        with self._changed:
            self._num_left += 1
        threading.Thread(target=self._free, args=(held,), name="free-weights", daemon=True).start()

    def _free(self, held: list[Any]) -> None:
        try:
            held.clear()
        finally:
            with self._changed:
                self._num_left -= 1
                self._changed.notify_all()

    def wait(self, timeout_s: float) -> None:
        """Return when all of it is free.

        Raises:
            TimeoutError: if it isn't within `timeout_s`.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: not self._num_left, timeout_s):
                raise TimeoutError(
                    f"the memory of weights that were dropped is not free after {timeout_s:g} s: try again"
                )
