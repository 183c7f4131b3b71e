"""Owns building the kernels for CPUs: by the machine's own compiler, for its processor, once for each of both.

    python -m ramet.srt.layers.cpu_kernels.build [--no-wait]

Several processes may want to build at once: one does, the others wait for it. No torch.
"""

import fcntl
import functools
import hashlib
import importlib.util
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ramet.srt.environ import cache_folder, envs

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "native"
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O2", "-fpeel-loops", "-fPIC", "-pthread", "-ffp-contract=fast", "-fno-math-errno")
LONGEST = ("tiles", "row_products")  # of the sources: they are begun first
TIMEOUT_S = 300  # on a machine that has much else to do


EX_TEMPFAIL = 75  # of main: another process builds


class NoCompilerError(RuntimeError):
    """This machine has none."""


def find_compiler() -> list[str] | None:
    """The command of a C++ compiler: $CXX, one on the path, or the one of the package `ziglang`; None without any."""
    if command := shlex.split(os.environ.get("CXX", "")):
        return command
    for name in COMPILERS:
        if path := shutil.which(name):
            return [path]
    if importlib.util.find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "c++"]
    return None


@functools.cache
def processor() -> str:
    """What the compiler makes the code for: the processor's name and what it can."""
    parts = [platform.machine()]
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return parts[0]
    for key in ("model name", "flags", "CPU implementer", "CPU part", "Features"):
        found = next((line for line in lines if line.startswith(key)), "")
        parts.append(found.partition(":")[2].strip())
    return " ".join(parts)


def library_path() -> Path:
    """Where the library for this processor and these sources lies, once it is built."""
    digest = hashlib.sha256(processor().encode() + " ".join(FLAGS).encode())
    for source in sorted(SOURCES.iterdir()):
        if source.suffix in (".cpp", ".h"):
            digest.update(source.name.encode() + source.read_bytes())
    return cache_folder("cpu_kernels", envs.RAMET_CPU_KERNELS_DIR) / f"{digest.hexdigest()[:24]}.so"


def build(*, waits: bool = True) -> Path:
    """The path of the library, which is built if it is not there.

    Args:
        waits: for another process that builds.

    Raises:
        BlockingIOError: if another process builds, without `waits`.
        NoCompilerError: if there is no compiler.
        RuntimeError: if it does not compile; the message ends with what the compiler says.
        OSError: if it can't be kept.
    """
    path = library_path()
    if path.is_file():
        return path
    compiler = find_compiler()
    if compiler is None:
        raise NoCompilerError(
            f"there is no C++ compiler: neither $CXX nor {', '.join(COMPILERS)} nor the package ziglang"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(
            lock, fcntl.LOCK_EX if waits else fcntl.LOCK_EX | fcntl.LOCK_NB
        )  # given back when the process ends, however it does
        if not path.is_file():
            _compile(compiler, path)
    return path


def _compile(compiler: list[str], path: Path) -> None:
    """Each source by itself, as many at a time as there are processors, and all of them together in the end."""
    native = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    name = " ".join(compiler)
    with tempfile.TemporaryDirectory(prefix="building-", dir=path.parent) as folder:
        sources = sorted(SOURCES.glob("*.cpp"), key=lambda source: (source.stem not in LONGEST, source))
        objects = [f"{folder}/{source.stem}.o" for source in sources]
        commands = [[*compiler, *FLAGS, native, "-c", "-o", made, str(source)]
                    for made, source in zip(objects, sources, strict=True)]  # fmt: skip
        try:
            with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
                for error in pool.map(_run, commands):
                    if error:
                        raise RuntimeError(f"{name} does not build the kernels: {error}")
            made = f"{folder}/all.so"
            if error := _run([*compiler, *FLAGS, "-shared", "-o", made, *objects]):
                raise RuntimeError(f"{name} does not link the kernels: {error}")
            os.replace(made, path)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise RuntimeError(f"{name} does not build the kernels: {error}") from error


def _run(command: list[str]) -> str:
    """What a compiler says if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if not done.returncode:
        return ""
    lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    return " | ".join(lines[-5:])


def main() -> int:
    """Build, and print where the library is."""
    try:
        print(build(waits="--no-wait" not in sys.argv[1:]))
    except BlockingIOError:
        return EX_TEMPFAIL
    except (RuntimeError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
