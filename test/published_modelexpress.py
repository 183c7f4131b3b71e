"""Keeps an environment for each published version of the modelexpress package, and runs the driver in it.

Neither torch nor a transfer library comes along: the package is installed without its dependencies, and beside it just
what its client and its stubs import.
"""

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
DRIVER = Path(__file__).with_name("published_modelexpress_driver.py")
REQUIREMENTS = {"0.3.0": ["grpcio>=1.66.2", "protobuf>=5.27,<6"], "0.7.0": ["grpcio>=1.66.2", "protobuf>=5.27.2,<7"]}
VERSIONS = tuple(REQUIREMENTS)
SETUP_TIMEOUT_S = 240


def published_python(version: str) -> Path:
    """The interpreter of the version's environment, which is made if it is not there. Skips the test if it can't be."""
    folder = ROOT / ".run" / "published" / f"modelexpress-{version}-py{sys.version_info[0]}.{sys.version_info[1]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    done = folder / "done"
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            try:
                run_setup([sys.executable, "-m", "venv", "--clear", "--without-pip", str(folder)])
                pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "-q"]
                run_setup([*pip, "--no-deps", f"modelexpress=={version}"])
                run_setup([*pip, "--only-binary=:all:", *REQUIREMENTS[version]])
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
                pytest.skip(f"modelexpress {version} cannot be installed: {getattr(error, 'stderr', error)}")
            done.touch()
    return folder / "bin" / "python"


def run_setup(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=SETUP_TIMEOUT_S)


def start_driver(version: str, *arguments: str) -> subprocess.Popen[str]:
    """The driver, running; its stdin and stdout are pipes of text."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("MX_", "MODEL_EXPRESS"))}
    environ["PYTHONPATH"] = str(ROOT / "python")
    return subprocess.Popen(
        [str(published_python(version)), str(DRIVER), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environ,
    )


def run_driver(version: str, *arguments: str) -> Any:
    """What the driver prints, which is JSON."""
    process = start_driver(version, *arguments)
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, err
    return json.loads(out)
