"""Owns the library of kernels for CPUs in this process: loading it, or building it beside serving, and its threads."""

import atexit
import ctypes
import logging
import subprocess
import sys
import threading
from pathlib import Path

from ramet.srt.environ import envs
from ramet.srt.layers.cpu_kernels import build

logger = logging.getLogger(__name__)

Pointer, Size, Int, Float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
# What each function takes; see native/.
FUNCTIONS = {
    "ramet_linear": [Int, Pointer, Pointer, Pointer, Pointer, Size, Size, Size],
}
NICE = 10  # of the compiler: serving goes first

_library: ctypes.CDLL | None = None
_begun = False


def library() -> ctypes.CDLL | None:
    """The library, once `prepare` has it."""
    return _library


def prepare(num_threads: int) -> None:
    """Compute with the library from now on, or from when it is built: that happens beside what the process does.

    Args:
        num_threads: that compute together.
    """
    global _begun
    if _begun or envs.RAMET_CPU_KERNELS.get() == "0":
        return
    _begun = True
    path = build.library_path()
    if path.is_file():
        _load(path, num_threads)
    elif build.find_compiler() is None:
        logger.warning("CPU kernels: no C++ compiler is installed; PyTorch's own operations compute, which takes longer")
    else:
        logger.info("CPU kernels are built beside serving; until then PyTorch's own operations compute")
        threading.Thread(target=_build, args=(num_threads,), name="build-cpu-kernels", daemon=True).start()


def _build(num_threads: int) -> None:
    command = [sys.executable, "-c", f"import os; os.nice({NICE}); from {build.__name__} import main; raise SystemExit(main())"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        atexit.register(process.kill)
        try:
            out, error = process.communicate(timeout=2 * build.TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            out, error = "", "it takes too long"
        finally:
            atexit.unregister(process.kill)
    if process.returncode == 0:
        _load(Path(out.strip()), num_threads)
    else:
        logger.warning("CPU kernels are not built; PyTorch's own operations compute: %s", error.strip())


def _load(path: Path, num_threads: int) -> None:
    global _library
    try:
        loaded = ctypes.CDLL(str(path))
        for name, types in FUNCTIONS.items():
            function = getattr(loaded, name)
            function.argtypes, function.restype = types, None
        loaded.ramet_set_threads.argtypes = [Int]
        given = loaded.ramet_set_threads(num_threads)
        lanes = loaded.ramet_lanes()
    except (OSError, AttributeError) as error:
        logger.warning("CPU kernels can't be loaded; PyTorch's own operations compute: %s", error)
        return
    logger.info("CPU kernels: vectors of %d numbers, %d threads", lanes, given)
    _library = loaded
