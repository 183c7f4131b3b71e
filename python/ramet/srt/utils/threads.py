"""Owns how many threads move bytes, how they share a list of jobs, and work that nobody waits for in the end."""

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

MAX_COPY_THREADS = 16  # memory bandwidth of a socket is used up well before this

Job = TypeVar("Job")
Result = TypeVar("Result")


def num_copy_threads(limit: int = MAX_COPY_THREADS) -> int:
    """Threads for copying, hashing and touching memory: one per core that this process may use."""
    return min(limit, len(os.sched_getaffinity(0)))


def run_in_threads(
    jobs: Iterable[Job],
    make_worker: Callable[[], Callable[[Job], None]],
    name: str,
    num_threads: int | None = None,
) -> None:
    """Run every job; the first error stops the others at their next job and is raised.

    Args:
        make_worker: called once in each thread, so that a worker can own a buffer.
        num_threads: `num_copy_threads()` unless given.
    """
    queue = _SharedIterator(jobs)

    def work() -> None:
        worker = make_worker()
        try:
            for job in queue:
                worker(job)
        except BaseException:
            queue.stop()
            raise

    count = num_threads or num_copy_threads()
    with ThreadPoolExecutor(count, thread_name_prefix=name) as pool:
        futures = [pool.submit(work) for _ in range(count)]
    for future in futures:
        future.result()


def run_beside(work: Callable[[], Result], name: str) -> Future[Result]:
    """Run something in a thread of its own for which the end of the process does not wait."""
    future = Future[Result]()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - who waits for the future gets it
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


class _SharedIterator(Generic[Job]):
    """Hands each item of an iterable to exactly one of several threads."""

    def __init__(self, items: Iterable[Job]) -> None:
        self._items = iter(items)
        self._lock = threading.Lock()
        self._stopped = False

    def __iter__(self) -> "_SharedIterator[Job]":
        return self

    def __next__(self) -> Job:
        with self._lock:
            if self._stopped:
                raise StopIteration
            return next(self._items)

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
