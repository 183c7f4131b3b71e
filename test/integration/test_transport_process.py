"""Owns the tests of the process that runs Mooncake: where it listens, what strangers can do, and its next life."""

import contextlib
import os
import signal
import socket
import struct
import sys
import time
from pathlib import Path

import pytest
from fake_seeds import toy_arena, toy_tensors
from ramet.srt.configs.load_config import LoadConfig
from ramet.srt.model_loader.arena.allocate import allocate_arena
from ramet.srt.model_loader.client.open_sources import SeedSources
from ramet.srt.model_loader.client.seed_instance import SeedInstance, SeedRank
from ramet.srt.model_loader.client.transfer import SeedTransfer
from ramet.srt.model_loader.seed import weight_seed
from ramet.srt.model_loader.seed.weight_seed import WeightSeed
from ramet.srt.model_loader.transport import memory_offer
from ramet.srt.model_loader.transport.listening_address import listeners
from ramet.srt.model_loader.transport.memory_offer import MemoryOffer, offer_memory, start_offering_process
from ramet.srt.model_loader.transport.receivers import Receivers, normal_session_id
from ramet.srt.model_loader.transport.transport_process import TransportMissingError, TransportProcess
from ramet.srt.utils import host_memory
from ramet.srt.utils.net import SeedAddress
from ramet.srt.weights.errors import WeightTransferError
from ramet.srt.weights.planner import ArenaSource
from ramet.srt.weights.registration import make_answer, parse_answer
from seed_process import SeedProcess, holds
from stranger import write_as_a_stranger

PAGE = host_memory.PAGE_BYTES
DEADLY = struct.pack("<Q", 2) + b"[]"  # a handshake of two bytes that is no object: ends Mooncake 0.3.13


def wait_for(condition, timeout_s=20.0):
    """The first true value of `condition`."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return value


def is_running(pid):
    return os.path.exists(f"/proc/{pid}") and "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()


def send_deadly_bytes(process_or_offer):
    host, _, port = process_or_offer.session_id.rpartition(":")
    with socket.create_connection((host.strip("[]"), int(port)), 5) as connection:
        connection.sendall(DEADLY)


@contextlib.contextmanager
def offered(arena, host="127.0.0.1"):
    """The arena's memory on offer, as a seed does it."""
    arena.publish()
    offer = MemoryOffer(arena, start_offering_process(host, 0))
    try:
        yield offer
    finally:
        offer.close()
        wait_for(lambda: not is_running(offer.pid))


def read(offer, nbytes, host="127.0.0.1"):
    """The first bytes of what is on offer, by a client's process."""
    size = -(-nbytes // PAGE) * PAGE
    fd = host_memory.create_memfd("target", size)
    receivers = Receivers(host, 0)
    try:
        process = receivers.get(offer.session_id)
        start = process.open_window([fd], [size])
        process.read(offer.session_id, [start], [offer.address], [nbytes], 10)
        return os.pread(fd, nbytes, 0)
    finally:
        receivers.close()
        os.close(fd)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.0.0.2"])
def test_it_listens_on_its_host_s_address_alone_and_serves(host):
    arena = toy_arena(1)
    with offered(arena, host) as offer:
        addresses = {listener.address for listener in listeners(offer.pid)}
        assert addresses == {"127.0.0.1" if host == "localhost" else host}
        if host != "127.0.0.2":
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.2", int(offer.session_id.rpartition(":")[2])), 5)
        assert read(offer, arena.nbytes, host) == bytes(arena.memory)


@pytest.mark.parametrize("host", ["::1", "127.0.0.1"])
def test_a_client_of_the_other_family_reads_from_it(host):
    """A receiver listens on loopback, of the family that its seed has."""
    arena = toy_arena(1)
    with offered(arena, host) as offer:
        assert read(offer, arena.nbytes, "127.0.0.1" if host == "::1" else "::1") == bytes(arena.memory)


def test_an_ipv6_seed_and_client_of_ours():
    """Also where the seed is an older one, which leaves the brackets out of its session id."""
    assert normal_session_id("::1:15000") == normal_session_id("[::1]:15000") == "[::1]:15000"
    assert normal_session_id("10.0.0.1:15000") == "10.0.0.1:15000" and normal_session_id("a.b:1") == "a.b:1"
    seed_arena = toy_arena(1)
    seed = WeightSeed.start(seed_arena.manifest, seed_arena, host="::1")
    try:
        answer = parse_answer(make_answer(seed.registration))
        assert answer.session_id.startswith("[::1]:")
        config = LoadConfig(host="::1", timeout_s=10.0)
        client = allocate_arena(seed_arena.manifest, "cpu")
        instance = SeedInstance(SeedAddress("::1", 1), config, client.manifest)
        source = ArenaSource("rank 0", answer.manifest)
        instance.ranks.append(SeedRank(instance.server, answer, False, source))
        SeedTransfer(client, [instance], lambda: SeedSources(client, config)).run()
        assert client.memory == seed_arena.memory
    finally:
        seed.close()


def test_weights_can_be_read_and_not_be_written():
    arena = toy_arena(1)
    with offered(arena) as offer:
        assert write_as_a_stranger(offer.session_id, offer.address) < 0
        assert holds(arena, toy_tensors(1)) and read(offer, arena.nbytes) == bytes(arena.memory)


def test_a_stranger_s_bytes_end_the_process_and_the_offer_goes_on(caplog):
    """Under the same session id and address: what others were told of it stays true."""
    caplog.set_level("INFO")
    arena = toy_arena(1)
    with offered(arena) as offer:
        for _ in range(2):
            before, told = offer.pid, (offer.session_id, offer.address)
            send_deadly_bytes(offer)
            wait_for(lambda before=before: offer.pid != before)
            assert (offer.session_id, offer.address) == told
            assert read(offer, arena.nbytes) == bytes(arena.memory)
            assert {listener.address for listener in listeners(offer.pid)} == {"127.0.0.1"}
    lines = [record.getMessage() for record in caplog.records if record.name.endswith("memory_offer")]
    assert [line.split(": ", 1)[1].split(";")[0].split(",")[0] for line in lines] == [
        "the transport process was ended by SIGABRT",
        "weights are read over the network again",
    ] * 2


def take_port(port):
    """A socket that listens there, once nobody else does."""
    try:
        return socket.create_server(("127.0.0.1", port))
    except OSError:
        return None


def test_a_port_that_somebody_has_taken_meanwhile_is_had_when_it_is_free(monkeypatch, caplog):
    monkeypatch.setattr(memory_offer, "FIRST_PAUSE_S", 1.0)  # in which the port is taken
    arena = toy_arena(1)
    with offered(arena) as offer:
        before, port = offer.pid, int(offer.session_id.rpartition(":")[2])
        os.kill(before, signal.SIGSTOP)
        os.kill(before, signal.SIGKILL)
        with contextlib.ExitStack() as taken:
            taken.enter_context(wait_for(lambda: take_port(port)))
            wait_for(lambda: "can't be started again" in caplog.text)
        wait_for(lambda: offer.pid != before)
        assert read(offer, arena.nbytes) == bytes(arena.memory)


def test_a_stopped_process_is_replaced(monkeypatch, caplog):
    monkeypatch.setattr(memory_offer, "PING_PERIOD_S", 0.1)
    monkeypatch.setattr(memory_offer, "PING_TIMEOUT_S", 1.0)
    arena = toy_arena(1)
    with offered(arena) as offer:
        stopped = offer.pid
        os.kill(stopped, signal.SIGSTOP)
        wait_for(lambda: offer.pid != stopped)
        monkeypatch.setattr(memory_offer, "PING_TIMEOUT_S", 30.0)
        assert read(offer, arena.nbytes) == bytes(arena.memory)
        assert f"the transport process {stopped} has not moved for 1 s: ending it" in caplog.text


def test_a_process_that_is_ended_before_the_offer_is_made_is_replaced():
    """It is started while the weights still come, which may take minutes."""
    arena = toy_arena(1)
    arena.publish()
    process = start_offering_process("127.0.0.1", 0)
    send_deadly_bytes(process)
    wait_for(lambda: not is_running(process.pid))
    offer = offer_memory(arena, process)
    assert offer.session_id == process.session_id and read(offer, arena.nbytes) == bytes(arena.memory)
    offer.close()


def test_a_client_s_process_that_ends_is_a_failed_read():
    with SeedProcess() as seed:
        process = TransportProcess("127.0.0.1", "127.0.0.1", 3)
        send_deadly_bytes(process)
        wait_for(lambda: not is_running(process.pid))
        with pytest.raises(WeightTransferError, match="rank 3 of .*: the transport process was ended by SIGABRT"):
            process.read("127.0.0.1:1", [0], [0], [1], 10)
        process.kill()
        assert seed.process.poll() is None


def test_a_read_without_progress_ends_with_its_process():
    """The batch may arrive at any later time: nobody is there to receive it."""
    with SeedProcess() as seed:
        (serving,) = seed.children
        process = TransportProcess("127.0.0.1", "127.0.0.1", 0)
        fd = host_memory.create_memfd("target", PAGE)
        start = process.open_window([fd], [PAGE])
        (port, *_) = sorted(listener.port for listener in listeners(serving))
        os.kill(serving, signal.SIGSTOP)
        with pytest.raises(WeightTransferError, match=r"no progress within 0\.3 s"):
            process.read(f"127.0.0.1:{port}", [start], [4096], [8], 0.3)
        process.kill()
        process.kill()
        assert not is_running(process.pid)
        os.kill(serving, signal.SIGCONT)
        os.close(fd)


@pytest.mark.parametrize("hangs", [False, True])
def test_a_killed_instance_leaves_no_transport_process_behind(hangs):
    with SeedProcess() as seed:
        (serving,) = seed.children
        if hangs:
            os.kill(serving, signal.SIGSTOP)
        seed.process.kill()
        seed.process.wait()
        wait_for(lambda: not is_running(serving))


def test_a_seed_for_its_own_host_needs_no_package(tmp_path, monkeypatch, caplog):
    broken = tmp_path / "mooncake"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise ImportError('libsomething.so is not there')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mooncake", raising=False)
    monkeypatch.setattr(weight_seed, "_is_missing", False)  # which is what it is again for other tests
    arena = toy_arena(1)
    with pytest.raises(TransportMissingError, match="Mooncake can't be used: libsomething.so is not there"):
        WeightSeed.start(arena.manifest, arena, host="127.0.0.1")
    seed = WeightSeed.start(arena.manifest, arena, host="127.0.0.1", network="wanted")
    try:
        assert "without a transfer engine: Mooncake can't be used" in caplog.text
        answer = parse_answer(make_answer(seed.registration))
        assert answer.local_handle is not None
        with pytest.raises(WeightTransferError, match="the seed runs no transfer engine; --remote-instance"):
            Receivers("127.0.0.1", 0).get(answer.session_id)
    finally:
        seed.close()
    monkeypatch.setattr(weight_seed, "start_offering_process", None)  # it is known now: no other process finds it out
    arena = toy_arena(1)
    WeightSeed.start(arena.manifest, arena, host="127.0.0.1", network="wanted").close()


def test_a_host_without_such_an_address_is_told_so():
    with pytest.raises(WeightTransferError, match=r"start failed for rank 0 of 192\.0\.2\.1: no address of this host"):
        start_offering_process("192.0.2.1", 0)


@pytest.mark.parametrize("network", ["unused", "required"])
def test_the_process_is_started_where_it_is_needed_alone(network):
    arena = toy_arena(1)
    seed = WeightSeed.start(arena.manifest, arena, host="127.0.0.1", network=network)
    children = Path("/proc/self/task").glob("*/children")
    pids = [pid for path in children for pid in path.read_text().split()]
    names = [Path(f"/proc/{pid}/comm").read_text().strip() for pid in pids]
    assert names.count("ramet-transport") == (1 if network == "required" else 0)
    seed.close()
