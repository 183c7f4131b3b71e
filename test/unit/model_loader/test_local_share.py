"""Owns the tests of handing an arena's memory file to a process on the same host."""

import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest
import toy_model as toy
from ramet.srt.model_loader.arena.allocate import allocate_arena
from ramet.srt.model_loader.arena.base import LentFile, LentMemory
from ramet.srt.model_loader.transport import local_share
from ramet.srt.model_loader.transport.local_share import LocalShareServer, ShareReply, request_memory
from ramet.srt.weights.manifest import layout_digest


@pytest.fixture
def arena():
    arena = allocate_arena(toy.make_manifest(toy.make_model()), "cpu")
    arena.memory[:3] = b"abc"
    arena.publish()
    return arena


@pytest.fixture
def server(arena):
    server = LocalShareServer(arena)
    yield server
    server.close()


def test_the_memory_file_arrives_and_can_only_be_read(arena, server):
    with request_memory(server.name, layout_digest(arena.manifest), 5) as memory:
        fd = memory.share.fd
        assert os.pread(fd, 3, 0) == b"abc" and not os.get_inheritable(fd)
        with pytest.raises(PermissionError):
            os.pwrite(fd, b"x", 0)
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 0)


def test_a_server_that_is_closed_leaves_nothing(arena):
    server = LocalShareServer(arena)
    server.close()
    with pytest.raises(ConnectionRefusedError):
        request_memory(server.name, "", 1)
    with open("/proc/net/unix", encoding="ascii") as file:
        assert server.name not in file.read()


def test_another_layout_is_refused(server):
    with pytest.raises(ValueError, match="another layout"):
        request_memory(server.name, "0" * 32, 5)


def test_another_user_is_refused_by_both_sides(arena, server, monkeypatch):
    real = local_share.peer_uid
    calls = []

    def seen_by_the_server_as_another(connection):
        calls.append(connection)
        return real(connection) + (connection.getsockname() == b"\0" + server.name.encode())

    monkeypatch.setattr(local_share, "peer_uid", seen_by_the_server_as_another)
    with pytest.raises(ValueError, match="may not have the memory"):
        request_memory(server.name, layout_digest(arena.manifest), 5)
    monkeypatch.setattr(local_share, "peer_uid", lambda connection: os.geteuid() + 1)
    with pytest.raises(ValueError, match="the socket belongs to user"):
        request_memory(server.name, layout_digest(arena.manifest), 5)


def test_garbage_does_not_stop_the_server(arena, server):
    for data in (b"", b"\xc1", b"x" * 5000):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.connect("\0" + server.name)
            connection.send(data)
    request_memory(server.name, layout_digest(arena.manifest), 5).__exit__()


def test_a_server_that_never_answers_is_given_up():
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent:
        silent.bind("\0ramet-test-silent-" + str(os.getpid()))
        silent.listen()
        with pytest.raises(TimeoutError):
            request_memory(silent.getsockname()[1:].decode(), "", 0.2)


class GpuArena:
    """What the server sees of an arena in a GPU's memory."""

    def __init__(self, manifest, error=None):
        self.manifest = manifest
        self.error = error

    def share(self):
        if self.error is not None:
            raise self.error
        return LentMemory(b"h" * 64, 512)


def test_a_gpus_memory_is_lent_for_as_long_as_both_sides_live(arena):
    server = LocalShareServer(GpuArena(arena.manifest))
    with request_memory(server.name, layout_digest(arena.manifest), 5) as memory:
        assert memory.share == LentMemory(b"h" * 64, 512)
        assert memory.seed_is_alive()
        closing = threading.Thread(target=server.close)
        closing.start()
        closing.join(0.05)
        assert closing.is_alive() and memory.seed_is_alive(), "the seed goes on while its memory is read"
    closing.join(5)
    assert not closing.is_alive()


def test_a_gpus_memory_goes_by_a_descriptor_as_well(arena):
    """Which the server closes when its reader has gone."""
    gpu, fds = GpuArena(arena.manifest), []
    gpu.share = lambda: fds.append(os.open("/dev/zero", os.O_RDONLY)) or LentFile(fds[-1], 4096)
    server = LocalShareServer(gpu)
    with request_memory(server.name, layout_digest(arena.manifest), 5) as memory:
        assert isinstance(memory.share, LentFile) and memory.share.nbytes == 4096 and memory.share.fd != fds[0]
        assert os.read(memory.share.fd, 2) == bytes(2) and memory.seed_is_alive()
    server.close()
    for fd in (*fds, memory.share.fd):
        with pytest.raises(OSError):
            os.fstat(fd)


def test_a_seed_that_dies_is_noticed(arena):
    name = f"ramet-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as seed:
        seed.bind("\0" + name)
        seed.listen()
        with ThreadPoolExecutor(1) as pool:
            asking = pool.submit(request_memory, name, "", 5)
            connection, _ = seed.accept()
            connection.recv(4096)
            connection.send(msgspec.msgpack.encode(ShareReply(cuda_ipc_handle=b"h" * 64)))
            with asking.result() as memory:
                assert memory.seed_is_alive()
                connection.close()
                assert not memory.seed_is_alive()


def test_memory_that_cannot_be_lent_is_refused_with_the_reason(arena):
    server = LocalShareServer(GpuArena(arena.manifest, OSError("cuIpcGetMemHandle: not supported")))
    with pytest.raises(ValueError, match="not supported"):
        request_memory(server.name, layout_digest(arena.manifest), 5)
    server.close()
