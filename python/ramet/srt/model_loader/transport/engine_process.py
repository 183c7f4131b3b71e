"""Owns the transport process: Mooncake's engine alone, so that what ends it ends nothing else.

It gets its memory as files and gives what it reads straight into them. It ends with the rank that has
started it. It imports neither torch nor numpy.
"""

import contextlib
import os
import socket
import sys
from concurrent.futures import ThreadPoolExecutor

import msgspec

from ramet.srt.model_loader.transport.engine_messages import (
    MAX_FDS,
    MESSAGE_BYTES,
    EngineReply,
    EngineRequest,
    Numbered,
    OfferMemory,
    OpenWindow,
    Ping,
    ReadRanges,
    StartEngine,
)
from ramet.srt.model_loader.transport.mooncake_engine import EngineError, EngineMissingError, MooncakeEngine
from ramet.srt.utils import cuda_driver, cuda_virtual_memory, host_memory
from ramet.srt.utils.helper_process import begin_helper

MAX_READS = 8  # at a time: more ranks are not read at once


def main(fd: int) -> None:
    """Serve the socket until the other side closes it."""
    begin_helper(b"ramet-transport")
    with contextlib.suppress(OSError):
        _Server(socket.socket(fileno=fd)).run()
    os._exit(0)  # the engine's destructor waits for reads that are stuck


class _Server:
    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._engine: MooncakeEngine | None = None
        self._decoder = msgspec.msgpack.Decoder(Numbered)
        self._pool = ThreadPoolExecutor(MAX_READS, thread_name_prefix="read")

    def run(self) -> None:
        while True:
            data, fds, _, _ = socket.recv_fds(self._connection, MESSAGE_BYTES, MAX_FDS)
            if not data:
                return
            message = self._decoder.decode(data)
            if isinstance(message.request, ReadRanges):
                self._pool.submit(self._answer, message.number, message.request, [])
            else:
                self._answer(message.number, message.request, fds)

    def _answer(self, number: int, request: EngineRequest, fds: list[int]) -> None:
        try:
            reply = self._handle(number, request, fds)
        except (EngineError, OSError) as error:
            reply = EngineReply(number, error=str(error), is_missing=isinstance(error, EngineMissingError))
        finally:
            for fd in fds:
                os.close(fd)
        self._connection.send(msgspec.msgpack.encode(reply))

    def _handle(self, number: int, request: EngineRequest, fds: list[int]) -> EngineReply:
        if isinstance(request, StartEngine):
            if request.gpu_id >= 0:
                with contextlib.suppress(OSError):  # opening the memory fails then, and says why
                    cuda_driver.use_primary_context(request.gpu_id)
            self._engine = MooncakeEngine(request)
            return EngineReply(number, port=self._engine.port)
        if isinstance(request, Ping):
            return EngineReply(number)
        engine = self._engine
        assert engine is not None, "the engine is started first"
        if isinstance(request, ReadRanges):
            engine.read(request.session_id, request.local, request.remote, request.nbytes)
            return EngineReply(number)
        if isinstance(request, OpenWindow):
            address, nbytes = host_memory.map_files(fds, request.nbytes), sum(request.nbytes)
        else:
            address, nbytes = _map_offered(request, fds), request.nbytes
        engine.register(address, nbytes)
        return EngineReply(number, address=address)


def _map_offered(request: OfferMemory, fds: list[int]) -> int:
    """Where offered memory is seen here: never to be written, where the memory is the host's."""
    if request.gpu_id >= 0:
        address = cuda_virtual_memory.import_for_good(fds[0], request.nbytes, request.gpu_id, request.address)
    elif not request.cuda_ipc_handle:
        return host_memory.map_file_read_only(fds[0], request.nbytes, request.address)
    else:
        address = cuda_driver.open_memory(request.cuda_ipc_handle) + request.offset
    if request.address not in (0, address):
        raise OSError(f"the GPU's memory is seen at {address:#x} now, and was at {request.address:#x}")
    return address


if __name__ == "__main__":
    main(int(sys.argv[1]))
