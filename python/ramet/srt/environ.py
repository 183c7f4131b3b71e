"""Owns the environment variables that are read: their names, types and defaults."""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class EnvStr:
    """A variable that holds text."""

    name: str
    default: str

    def get(self) -> str:
        """The value now; the default when it is unset or empty."""
        return os.environ.get(self.name) or self.default


class Envs:
    """Every variable, under its own name."""

    # Mooncake transport, "rdma" or "tcp"; empty chooses rdma where there is an RDMA device.
    MOONCAKE_PROTOCOL = EnvStr("MOONCAKE_PROTOCOL", "")
    # RDMA devices that Mooncake may use, comma-separated; empty means all.
    MOONCAKE_DEVICE = EnvStr("MOONCAKE_DEVICE", "")
    # Where /start_profile lets the ranks write their traces, and below which a caller may choose; empty means
    # `default_profile_dir()`, and no choice. --profile-dir goes before it.
    RAMET_TORCH_PROFILER_DIR = EnvStr("RAMET_TORCH_PROFILER_DIR", "")
    # "1" lets calls to a metadata server go by the proxy that http_proxy, https_proxy or grpc_proxy names. Otherwise
    # nothing between instances does: proxies are for the hub.
    RAMET_FABRIC_PROXY = EnvStr("RAMET_FABRIC_PROXY", "")
    # Where digests of checkpoints are kept; empty: ramet/digests in $XDG_CACHE_HOME, or in ~/.cache.
    RAMET_DIGEST_DIR = EnvStr("RAMET_DIGEST_DIR", "")
    # Where `ramet tune` keeps what it measures of kernels; empty: ramet/tuning, beside the digests.
    RAMET_TUNING_DIR = EnvStr("RAMET_TUNING_DIR", "")
    # Where kernels for CPUs are kept once they are built; empty: ramet/cpu_kernels, beside the digests.
    RAMET_CPU_KERNELS_DIR = EnvStr("RAMET_CPU_KERNELS_DIR", "")
    # "0": PyTorch's own operations compute on CPUs, as they do without a compiler.
    RAMET_CPU_KERNELS = EnvStr("RAMET_CPU_KERNELS", "1")


def default_profile_dir() -> str:
    """The folder of traces that nobody has named: this user's own."""
    return f"/tmp/ramet-profiles-{os.geteuid()}"


def cache_folder(name: str, given: EnvStr) -> Path:
    """Where something is kept from one start to the next: a user without a home has it among the temporary files."""
    if folder := given.get():
        return Path(folder)
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.path.isabs(cache):
        return Path(tempfile.gettempdir(), f"ramet-{name}-{os.geteuid()}")
    return Path(cache, "ramet", name)


envs = Envs()
