#!/usr/bin/env bash
# Makes the virtual environment for development: system libraries, torch first, then Ramet with its test tools.
# Usage: scripts/setup_env.sh VENV PYTHON EXTRA. Running it again is cheap and changes nothing that is in place.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1 python=$2 extra=$3

fail() { echo "setup: $*" >&2; exit 1; }

apt_install() {
    echo "setup: installing $* with apt-get"
    export DEBIAN_FRONTEND=noninteractive
    apt-get install -y -q --no-install-recommends "$@" >/dev/null 2>&1 && return
    apt-get update -q >/dev/null || fail "apt-get update failed"
    apt-get install -y -q --no-install-recommends "$@" >/dev/null || fail "apt-get could not install $*"
}

can_apt() { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; }

has_library() { "$python" -c 'import ctypes, sys; ctypes.CDLL(sys.argv[1])' "$1" 2>/dev/null; }

command -v "$python" >/dev/null || fail "there is no $python; install Python 3.11 or newer, or say make PYTHON=..."
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$("$python" --version) is too old; Ramet needs Python 3.11 or newer: make PYTHON=python3.11 ..."

# Mooncake's TransferEngine links against these even where there is no RDMA device.
missing=()
has_library libcurl.so.4 || missing+=(libcurl4)
has_library libibverbs.so.1 || missing+=(libibverbs1)
has_library librdmacm.so.1 || missing+=(librdmacm1)
has_library libnuma.so.1 || missing+=(libnuma1)
if [ ${#missing[@]} -gt 0 ]; then
    if can_apt; then
        apt_install "${missing[@]}"
    else
        echo "setup: system libraries are missing: ${missing[*]}" >&2
        echo "setup: without them weights cannot come from another host. As root: apt-get install ${missing[*]}" >&2
    fi
fi

if [ ! -x "$venv/bin/pip" ]; then
    if ! "$python" -c 'import ensurepip' 2>/dev/null; then
        can_apt || fail "$python has no venv module; as root: apt-get install python3-venv"
        apt_install python3-venv
        "$python" -c 'import ensurepip' 2>/dev/null || fail "$python still has no venv module; install it for $python"
    fi
    "$python" -m venv "$venv"
fi

echo "setup: installing torch and Ramet with the extras $extra,modelexpress,otel,test into $venv (the first time takes minutes)"
"$venv/bin/pip" install -q -c constraints.txt torch || fail "pip could not install torch"
"$venv/bin/pip" install -q -c constraints.txt -e ".[$extra,modelexpress,otel,test]" || fail "pip could not install Ramet's dependencies"
"$venv/bin/python" -m ramet.srt.layers.cpu_kernels.build >/dev/null ||
    echo "setup: kernels for CPUs are not built; PyTorch computes there, which takes longer (docs/cpu.md)" >&2
