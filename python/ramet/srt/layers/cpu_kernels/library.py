"""Owns the library of kernels for CPUs in this process: loading it, or building it beside serving, and its threads."""

import ctypes
import logging
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from ramet.srt.distributed import host_exchange
from ramet.srt.environ import envs
from ramet.srt.layers.cpu_kernels import build

logger = logging.getLogger(__name__)

Pointer, Size, Int, Float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


class AttentionCall(ctypes.Structure):
    """RametAttention of native/attention.cpp."""

    _fields_ = [
        *((name, Size) for name in ("num_sequences", "num_heads", "num_kv_heads", "key_dim", "value_dim")),
        *((name, Size) for name in ("value_stride", "page_size", "table_stride", "window")),
        *((name, Pointer) for name in ("rows", "starts", "ends", "first_tokens", "req_to_page")),
        *((name, Pointer) for name in ("q", "keys", "values", "out", "kv_scales", "sinks")),
        *((name, Float) for name in ("scale", "soft_cap")),
        *((name, Int) for name in ("dtype", "cache_dtype")),
    ]


class RotationCall(ctypes.Structure):
    """RametRotation of native/rows.cpp."""

    _fields_ = [
        *((name, Size) for name in ("num_tokens", "num_heads", "num_kv_heads", "head_dim", "half")),
        *((name, Pointer) for name in ("qkv", "cos", "sin", "q_norm", "k_norm", "slots", "q", "k_cache", "v_cache")),
        ("kv_scales", Pointer),
        *((name, Float) for name in ("eps", "offset")),
        *((name, Int) for name in ("has_gates", "dtype", "cache_dtype")),
    ]


# What each function takes; see native/.
FUNCTIONS: dict[str, list[Any]] = {
    "ramet_linear": [Int, Pointer, Pointer, Pointer, Pointer, Size, Size, Size],
    "ramet_stored_linear": [Pointer, Size, Pointer, Int, Pointer, Pointer, Pointer, Size],
    "ramet_rms_norm": [Int, Pointer, Pointer, Pointer, Pointer, Size, Size, Float, Float],
    "ramet_act_and_mul": [Int, Int, Pointer, Pointer, Size, Size],
    "ramet_rotate_and_store": [ctypes.POINTER(RotationCall)],
    "ramet_attention": [ctypes.POINTER(AttentionCall)],
    "ramet_best_tokens": [Pointer, Pointer, Size, Size, Size],
    "ramet_sample": [Pointer, Pointer, Size, Size, *(Pointer for _ in range(6)), Size],
}
NICE = 10  # of the compiler: serving goes first
POLL_S = 0.5  # between looks whether another process has built them

_library: ctypes.CDLL | None = None
_begun = False


def library() -> ctypes.CDLL | None:
    """The library, once `prepare` has it."""
    return _library


def call(name: str, *arguments: Any) -> None:
    """Have "ramet_<name>" compute, for who has seen that the library is there. A profile shows it by that name."""
    assert _library is not None
    function = getattr(_library, f"ramet_{name}")
    if not torch.autograd.profiler._is_profiler_enabled:
        function(*arguments)
        return
    with torch.profiler.record_function(f"ramet::{name}"):
        function(*arguments)


def is_expected() -> bool:
    """Whether instances on this machine compute with the library, if not from their first pass on."""
    is_wanted = envs.RAMET_CPU_KERNELS.get() != "0"
    return is_wanted and (build.library_path().is_file() or build.find_compiler() is not None)


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
        load(path, num_threads)
    elif build.find_compiler() is None:
        logger.warning(
            "CPU kernels: no C++ compiler is installed; PyTorch's own operations compute, which takes longer"
        )
    else:
        logger.info("CPU kernels are built beside serving; until then PyTorch's own operations compute")
        threading.Thread(target=_build, args=(num_threads,), name="build-cpu-kernels", daemon=True).start()


def _build(num_threads: int) -> None:
    """Build in a process of its own, or wait for the process that does.

    It goes on if this one ends: it takes seconds, and the next start needs what it makes.
    """
    script = f"import os; os.nice({NICE}); from {build.__name__} import main; raise SystemExit(main())"
    command = [sys.executable, "-c", script, "--no-wait"]
    give_up_at = time.monotonic() + 2 * build.TIMEOUT_S
    code, error = build.EX_TEMPFAIL, "another process builds them, and takes too long"
    while code == build.EX_TEMPFAIL and time.monotonic() < give_up_at:
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
        ) as process:
            _, said = process.communicate()
        code, error = process.returncode, said or error
        if code == build.EX_TEMPFAIL:
            time.sleep(POLL_S)
    if code == 0:
        load(build.library_path(), num_threads)
    else:
        logger.warning("CPU kernels are not built; PyTorch's own operations compute: %s", error.strip())


def load(path: Path, num_threads: int) -> None:
    """Compute with the library at `path` from now on; what is wrong with it is logged."""
    global _library
    try:
        loaded = ctypes.CDLL(str(path))
        for name, types in FUNCTIONS.items():
            function = getattr(loaded, name)
            function.argtypes, function.restype = types, None
        host_exchange.use_kernels(loaded)
        loaded.ramet_set_threads.argtypes = [Int]
        given = loaded.ramet_set_threads(num_threads)
        lanes = loaded.ramet_lanes()
    except (OSError, AttributeError) as error:
        logger.warning("CPU kernels can't be loaded; PyTorch's own operations compute: %s", error)
        return
    logger.info("CPU kernels: vectors of %d numbers, %d threads", lanes, given)
    _library = loaded
