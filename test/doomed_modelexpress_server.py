"""Owns a metadata server that dies by SIGKILL in the middle of a call: run as a script, and started from tests.

python test/doomed_modelexpress_server.py PORT METHOD STATUS COUNT    dies instead of answering the COUNTth such call
"""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from ramet import modelexpress_server
from ramet.srt.modelexpress.proto import p2p_pb2
from ramet.srt.modelexpress.server import server
from ramet.srt.modelexpress.server.service import P2pService

ANY = ""


class DoomedService(P2pService):
    """P2pService until the call that kills it."""

    method = ""
    status = ANY
    count = 0  # calls like this one that are left until the end

    async def PublishMetadata(self, request: p2p_pb2.PublishMetadataRequest, context: Any) -> Any:
        self._count("PublishMetadata", request.worker.status)
        return await super().PublishMetadata(request, context)

    async def UpdateStatus(self, request: p2p_pb2.UpdateStatusRequest, context: Any) -> Any:
        self._count("UpdateStatus", request.status)
        return await super().UpdateStatus(request, context)

    def _count(self, method: str, status: int) -> None:
        name = p2p_pb2.SourceStatus.Name(status).removeprefix("SOURCE_STATUS_")
        if method == type(self).method and type(self).status in (ANY, name):
            type(self).count -= 1
            if type(self).count == 0:
                os.kill(os.getpid(), signal.SIGKILL)


class DoomedServer:
    """Such a server in a process of its own. Use as a context manager.

    Args:
        method: "PublishMetadata" or "UpdateStatus".
        status: in the call that kills it: "INITIALIZING", "READY" or "STALE"; ANY for every one.
        count: it dies at the call with this number.
    """

    def __init__(self, port: int, folder: Path, method: str, status: str = ANY, count: int = 1):
        command = [sys.executable, __file__, str(port), method, status, str(count)]
        with (folder / f"doomed-{port}.log").open("ab") as log:
            self.process = subprocess.Popen(command, stderr=log)

    def wait_killed(self, timeout_s: float = 60.0) -> None:
        """Return when the call has come."""
        assert self.process.wait(timeout_s) == -signal.SIGKILL

    def __enter__(self) -> "DoomedServer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.wait(10)


if __name__ == "__main__":
    port, DoomedService.method, DoomedService.status = sys.argv[1:4]
    DoomedService.count = int(sys.argv[4])
    server.P2pService = DoomedService  # type: ignore[misc]
    sys.exit(modelexpress_server.main(["--port", port, "--metrics-port", "0"]))
