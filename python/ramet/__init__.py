"""Ramet's public API: `Engine` and the version. Importing this package does not import torch."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ramet.srt.entrypoints.engine import Engine

__version__ = "0.1.0"
__all__ = ["Engine", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "Engine":
        from ramet.srt.entrypoints.engine import Engine

        return Engine
    raise AttributeError(f"module 'ramet' has no attribute {name!r}")
