#!/usr/bin/env bash
# Makes the environment VENV-lowest, with the lowest versions that setup.py allows. Usage: scripts/lowest_env.sh VENV.
# Torch, which is large, is lent by VENV: its lower bound isn't tested.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1 lowest=$1-lowest

rm -rf "$lowest"
"$venv/bin/python" -m venv "$lowest"
site=$("$lowest/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$venv/bin/python" - "$site" <<'PYTHON'
"""Lends torch, and what it imports besides packages that Ramet names itself."""
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

for name in ("torch", "sympy", "mpmath", "networkx", "setuptools"):
    try:
        lent = distribution(name)
    except PackageNotFoundError:
        continue
    for top in {file.parts[0] for file in lent.files or [] if not file.parts[0].startswith((".", "__pycache__"))}:
        target = Path(sys.argv[1]) / top
        if not target.exists():
            target.symlink_to(Path(str(lent.locate_file(top))))
PYTHON
# The tools aren't needed here, and transformers would raise what Ramet itself asks for.
without=(torch mypy ruff triton transformers types-requests grpcio-tools compose-spec kubernetes-validate)
"$venv/bin/python" scripts/lowest_versions.py --extra cpu --extra modelexpress --extra test \
    $(printf -- '--without %s ' "${without[@]}") > "$lowest/constraints.txt"
"$lowest/bin/python" -m pip install -q --disable-pip-version-check -r "$lowest/constraints.txt"
