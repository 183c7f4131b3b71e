"""Owns what a stranger does to weights that are on offer: Mooncake's own client writes to somebody else's memory."""

import subprocess
import sys

SCRIPT = """
import os, sys
os.environ["MC_LOG_LEVEL"] = "ERROR"
from mooncake.engine import TransferEngine
engine = TransferEngine()
assert engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0
buffer = engine.allocate_managed_buffer(4096)
engine.write_bytes_to_buffer(buffer, b"overwritten" * 100, 1100)
print(engine.transfer_sync_write(sys.argv[1], buffer, int(sys.argv[2]), 1100), flush=True)
os._exit(0)
"""


def write_as_a_stranger(session_id: str, address: int) -> int:
    """Mooncake's answer: below zero if the write was refused."""
    command = [sys.executable, "-c", SCRIPT, session_id, str(address)]
    written = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    return int(written)
