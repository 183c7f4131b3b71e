"""Owns which packages the attention backends need, and says so without importing any of them."""

import importlib.metadata
import importlib.util

VARLEN_TORCH = (2, 13)  # the first torch whose variable-length attention is known to take a block table


def missing_package(backend: str) -> str | None:
    """What --attention-backend `backend` lacks among the installed packages; None if nothing."""
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        return "the package triton, which is not installed"
    if backend == "flashinfer" and importlib.util.find_spec("flashinfer") is None:
        return "the package flashinfer, which is not installed (pip install flashinfer-python)"
    if backend == "flash_mla" and importlib.util.find_spec("flash_mla") is None:
        return "the package flash_mla, which is not installed (github.com/deepseek-ai/FlashMLA)"
    if backend == "torch_varlen":
        installed = importlib.metadata.version("torch")
        if _major_minor(installed) < VARLEN_TORCH:
            return f"torch {'.'.join(map(str, VARLEN_TORCH))} or newer; this is {installed}"
    return None


def check_attention_backend(backend: str) -> None:
    """Raises ValueError, before anything starts, where what --attention-backend `backend` needs isn't installed."""
    missing = missing_package(backend)
    if missing is not None:
        raise ValueError(f"--attention-backend {backend} needs {missing}")


def _major_minor(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)
