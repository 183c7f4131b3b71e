"""Owns the environments of the clients: one virtual environment for each file in requirements/, one folder for Node.

They lie in .run/clients-env, are made when they are needed first, and made anew when their file changes.
"""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
ENVIRONMENTS = REPOSITORY / ".run" / "clients-env"
DRIVERS = HERE / "drivers"
INSTALL_LIMIT_S = 1500.0
NODE_FILES = "node_modules/node/bin/node"


class EnvironmentFailed(Exception):
    """An environment could not be made; the message ends with what pip or npm said last."""


def python_of(group: str) -> Path:
    """The Python of a group of clients that can be installed together.

    Raises:
        EnvironmentFailed: if it can't be made.
    """
    wanted = (HERE / "requirements" / f"{group}.txt").read_text()
    folder = ENVIRONMENTS / group
    done = folder / "installed.txt"
    python = folder / "bin" / "python"
    if done.exists() and done.read_text() == wanted:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _run([sys.executable, "-m", "venv", str(folder)])
    pip = [str(python), "-m", "pip", "install", "-q", "-c", str(REPOSITORY / "constraints.txt")]
    lines = wanted.splitlines()
    if any(line.startswith("torch==") for line in lines):  # first and alone, so that nothing else can pull another one
        _run([*pip, "torch"])
    # The files name every package with its version, so there is nothing to resolve; what one of them says that it
    # needs and a client's work doesn't (CUDA's packages) is left out.
    _run([*pip, "--no-deps", "-r", str(HERE / "requirements" / f"{group}.txt")])
    done.write_text(wanted)
    return python


def node_folder() -> tuple[Path, Path]:
    """Node and the folder with the drivers' copies, beside which their packages lie.

    Raises:
        EnvironmentFailed: if there is no npm, or it can't install them.
    """
    folder = ENVIRONMENTS / "node"
    done = folder / "installed.json"
    wanted = (HERE / "node" / "package.json").read_text()
    if not done.exists() or done.read_text() != wanted:
        if shutil.which("npm") is None:
            raise EnvironmentFailed("there is no npm; as root: apt-get install npm")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "package.json").write_text(wanted)
        _run(["npm", "install", "--no-audit", "--no-fund", "--no-package-lock"], folder)
        done.write_text(wanted)
    drivers = folder / "drivers"
    drivers.mkdir(exist_ok=True)
    shutil.copy(HERE / "flow.json", folder)
    for driver in DRIVERS.glob("*.mjs"):  # a module finds packages only in folders above its own
        shutil.copy(driver, drivers)
    return folder / NODE_FILES, drivers


def clean_environment() -> dict[str, str]:
    """For programs that are not Ramet: without this project's paths, keys and proxies."""
    kept = {name: value for name, value in os.environ.items() if not name.upper().endswith(("_PROXY", "_API_KEY"))}
    for name in ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME"):
        kept.pop(name, None)
    return {**kept, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "DO_NOT_TRACK": "1"}


def _run(command: list[str], folder: Path | None = None) -> None:
    result = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=INSTALL_LIMIT_S, env=clean_environment()
    )
    if result.returncode:
        lines = (result.stdout + result.stderr).splitlines()
        told = "\n".join(line for line in lines if not line.startswith("WARNING: Location"))
        raise EnvironmentFailed(f"{' '.join(command)}:\n{told[-2000:]}")


def main() -> None:
    """Make all environments, one after another. What can't be made is told; its tests fail and say the same."""
    groups = sorted(file.stem for file in (HERE / "requirements").glob("*.txt"))
    for name, make in [*((group, functools.partial(python_of, group)) for group in groups), ("node", node_folder)]:
        try:
            make()
            print(f"test-clients: {name} is ready", flush=True)
        except EnvironmentFailed as error:
            print(f"test-clients: {name} could not be made: {error}", flush=True)


if __name__ == "__main__":
    main()
