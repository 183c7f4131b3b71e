#!/usr/bin/env bash
# Gathers what a Linux GPU host without a network needs to run Ramet and its tests: wheels for x86-64, without torch.
# Usage: scripts/gather_wheels.sh [FOLDER=wheels] [PYTHON_VERSION=3.12] [EXTRA=cuda12]
# On the host, which has its own torch:
#   pip install --no-index --find-links FOLDER ramet[cuda12,test]
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-wheels} version=${2:-3.12} extra=${3:-cuda12}
python=${PYTHON:-.venv/bin/python}
mkdir -p "$folder"

# pip has no "all but torch": take the requirements as a list, drop torch, and drop what only torch needs by not
# following the packages that require it.
requirements=$(mktemp)
trap 'rm -f "$requirements"' EXIT
"$python" - "$extra" >"$requirements" <<'PY'
import runpy, sys
import setuptools

found = {}
setuptools.setup = found.update
runpy.run_path("setup.py")
for line in found["install_requires"] + found["extras_require"][sys.argv[1]] + found["extras_require"]["test"]:
    if not line.startswith("torch"):
        print(line)
PY

platforms=()
for glibc in 2_39 2_38 2_37 2_36 2_35 2_34 2_33 2_32 2_31 2_28 2_27 2_24 2_17; do
    platforms+=(--platform "manylinux_${glibc}_x86_64")
done
platforms+=(--platform manylinux2014_x86_64 --platform manylinux2010_x86_64 --platform manylinux1_x86_64)
"$python" -m pip download -q --only-binary=:all: --implementation cp --python-version "$version" \
    "${platforms[@]}" --dest "$folder" --requirement "$requirements"
"$python" -m pip wheel -q --no-deps --no-build-isolation --wheel-dir "$folder" .
rm -f "$folder"/torch-*.whl "$folder"/nvidia_*.whl "$folder"/triton-*.whl

echo "$(ls "$folder" | wc -l) wheels, $(du -sh "$folder" | cut -f1), in $folder"
