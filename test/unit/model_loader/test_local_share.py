"""Owns the tests of handing an arena's memory file to a process on the same host."""

import os
import socket

import pytest
import toy_model as toy
from ramet.srt.model_loader import local_share
from ramet.srt.model_loader.local_share import LocalShareServer, request_memory
from ramet.srt.model_loader.weight_arena import WeightArena
from ramet.srt.model_loader.weight_manifest import layout_digest


@pytest.fixture
def arena():
    arena = WeightArena.allocate(toy.make_manifest(toy.make_model()), "cpu")
    arena.memory[:3] = b"abc"
    arena.publish()
    return arena


@pytest.fixture
def server(arena):
    server = LocalShareServer(arena)
    yield server
    server.close()


def test_the_memory_file_arrives_and_can_only_be_read(arena, server):
    fd = request_memory(server.name, layout_digest(arena.manifest), 5)
    assert os.pread(fd, 3, 0) == b"abc" and not os.get_inheritable(fd)
    with pytest.raises(PermissionError):
        os.pwrite(fd, b"x", 0)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 0)
    os.close(fd)


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
    os.close(request_memory(server.name, layout_digest(arena.manifest), 5))


def test_a_server_that_never_answers_is_given_up():
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent:
        silent.bind("\0ramet-test-silent-" + str(os.getpid()))
        silent.listen()
        with pytest.raises(TimeoutError):
            request_memory(silent.getsockname()[1:].decode(), "", 0.2)
