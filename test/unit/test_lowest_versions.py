"""The lowest versions are those that setup.py names, and every bound is one that can be installed and tested."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "lowest_versions.py"


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True, timeout=30)


def test_every_requirement_has_a_lowest_version():
    every_extra = [
        word for extra in ("cpu", "cuda12", "cuda13", "modelexpress", "cudnn", "test") for word in ("--extra", extra)
    ]
    done = run(*every_extra, "--without", "torch")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    text = (ROOT / "setup.py").read_text()
    assert len(lines) > 30 and not any(line.startswith("torch==") for line in lines)
    for line in lines:
        name, version = line.split("==")
        assert f'"{name}>={version}' in text


def test_an_extra_that_is_not_there_is_refused():
    done = run("--extra", "gpu")
    assert done.returncode == 2 and "no extra 'gpu'; it has cpu, cuda12" in done.stderr
