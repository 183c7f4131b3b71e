"""Owns how log lines look: the same in every process of an instance."""

import logging
import sys


def configure_logging(level: str, process: str) -> None:
    """Log to stderr from `level` ("debug", …) on, with the `process` ("server", "scheduler 0", …) in each line."""
    logging.basicConfig(
        level=level.upper(),
        format=f"[%(asctime)s {process}] %(levelname)s %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
        stream=sys.stderr,
        force=True,
    )
    for noisy in ("httpx", "httpcore", "urllib3", "filelock", "huggingface_hub", "asyncio", "uvicorn"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, logging.getLogger().level))
