"""Owns the tests of taking weights from a seed that is a process of its own, in good and in bad moments."""

import logging
import os
import re
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import seed_process
from ramet.srt.configs.load_config import LoadConfig
from ramet.srt.model_loader import remote_instance_weight_loader_utils
from ramet.srt.model_loader.arena.allocate import allocate_arena
from ramet.srt.model_loader.arena.host import HostReceiveWindow
from ramet.srt.model_loader.client import transfer_engine
from ramet.srt.model_loader.loader import get_model_loader
from ramet.srt.model_loader.seed.weight_seed import WeightSeed
from ramet.srt.model_loader.transport.transport_process import TransportProcess
from ramet.srt.utils import host_memory
from ramet.srt.utils.http_client import http_request
from ramet.srt.utils.net import SeedAddress
from ramet.srt.weights import registration
from ramet.srt.weights.errors import WeightTransferError
from safetensors.numpy import save_file
from seed_process import DEFAULTS, SeedProcess
from tls_server import make_certificates, server_context, serving, tls_in_front_of

BIG = {"shapes": {f"w{i}": [6 << 20] for i in range(4)}}  # 96 MB of float32
SMALL_BATCH = 8 << 20


def disk_folder(path, config, fill):
    """A model folder with the same layout and other numbers: what came from where can be told apart."""
    tensors = seed_process.make_tensors(config | {"fill": fill})
    dtype = {"float32": np.float32, "float16": np.float16}[config["dtype"]]
    save_file(
        {name: tensors[name].view(dtype).reshape(shape) for name, shape in config["shapes"].items()},
        path / "model.safetensors",
    )
    return tensors


class Client:
    """What a starting instance does with its weights."""

    def __init__(self, port, config=None, scheme="http", **options):
        self.config = DEFAULTS | (config or {})
        self.manifest = seed_process.make_manifest(self.config)
        self.arena = allocate_arena(self.manifest, "cpu")
        load_config = {"timeout_s": 20.0, "fallback": "error", "local_mode": "off"} | options
        self.loader = get_model_loader(
            LoadConfig(
                load_format="remote_instance",
                seeds=(SeedAddress("127.0.0.1", port, scheme),),
                **load_config,
            )
        )

    def load(self, folder="/nonexistent"):
        return self.loader.load_weights(self.manifest, self.arena, str(folder)).report

    def holds(self, config):
        return seed_process.holds(self.arena, seed_process.make_tensors(config))


@pytest.fixture(scope="module")
def small_seed():
    with SeedProcess() as seed:
        yield seed


@pytest.mark.parametrize(
    ("mode", "source"),
    [("auto", "local_map"), ("map", "local_map"), ("copy", "local_copy"), ("off", "transfer_engine")],
)
def test_weights_come_by_each_way_and_are_verified(small_seed, caplog, mode, source):
    caplog.set_level(logging.INFO)
    client = Client(small_seed.port, local_mode=mode)
    report = client.load()
    assert (report.source, report.verified, report.fallback_reason) == (source, True, "")
    assert report.taken_from == (f"127.0.0.1:{small_seed.port}",)
    assert report.taken_bytes == (report.num_bytes,)
    assert report.num_bytes >= client.manifest.payload_nbytes and report.seconds > 0
    assert client.holds(small_seed.config)


def test_a_seed_behind_tls(small_seed, tmp_path):
    certificates = make_certificates(tmp_path)
    with tls_in_front_of(small_seed.port, server_context(certificates)) as port:
        client = Client(port, scheme="https", local_mode="auto", ssl_ca_certs=str(certificates / "ca.pem"))
        report = client.load()
        assert (report.verified, report.taken_from) == (True, (f"https://127.0.0.1:{port}",))
        assert client.holds(small_seed.config)
        with pytest.raises(WeightTransferError, match="certificate verify failed"):
            Client(port, scheme="https").load()


def test_an_upstream_seed_is_matched_by_name_and_size(caplog):
    with SeedProcess(without_manifest=True) as seed:
        client = Client(seed.port, local_mode="auto")
        report = client.load()
        assert (report.source, report.verified) == ("transfer_engine", False)
        assert client.holds(seed.config)
        assert "sends no manifest" in caplog.text and "dtype" in caplog.text
        differs = r": type, size or .* differs for .*b \(64000 elements of 4 bytes there, 64000 of 2 here\)"
        with pytest.raises(WeightTransferError, match=differs):
            Client(seed.port, {"dtype": "float16"}).load()


def test_an_upstream_client_can_read_from_our_seed(small_seed):
    """What upstream does: the deprecated route, then one read per tensor at its absolute address."""
    _, body = http_request(
        f"http://127.0.0.1:{small_seed.port}/get_remote_instance_transfer_engine_info?rank=0",
        "GET",
        timeout_s=10,
        max_nbytes=1 << 20,
    )
    answer = registration.parse_answer(body)
    address, num_elements, size = answer.weights_info["b"]
    fd = host_memory.create_memfd("target", 256000)
    engine = TransportProcess("127.0.0.1", "127.0.0.1", 0)
    try:
        start = engine.open_window([fd], [256000 // 4096 * 4096 + 4096])
        engine.read(answer.session_id, [start], [address], [num_elements * size], 10)
    finally:
        engine.kill()
    target = np.frombuffer(os.pread(fd, 256000, 0), np.uint8)
    os.close(fd)
    assert np.array_equal(target, seed_process.make_tensors(small_seed.config)["b"])


@pytest.mark.parametrize("mode", ["auto", "off"])
def test_defect_2_a_client_is_a_seed_for_the_next(small_seed, mode):
    first = Client(small_seed.port, local_mode=mode)
    first.load()
    seed = WeightSeed.start(first.manifest, first.arena, host="127.0.0.1")
    try:
        answer = registration.parse_answer(registration.make_answer(seed.registration))
        assert answer.manifest.checksums == first.arena.checksums
        for second_mode in ("auto", "copy", "off"):
            with answering(registration.make_answer(seed.registration)) as port:
                second = Client(port, local_mode=second_mode)
                assert second.load().verified
            assert second.holds(small_seed.config)
    finally:
        seed.close()


def test_the_seed_s_death_does_not_harm_a_client_that_mapped():
    with SeedProcess() as seed:
        client = Client(seed.port, local_mode="map")
        assert client.load().source == "local_map"
        seed.kill()
        assert client.holds(seed.config)


def test_mapping_takes_no_memory():
    with SeedProcess(**BIG) as seed:
        client = Client(seed.port, BIG, local_mode="map")
        client.load()
        assert client.holds(seed.config)  # reads all of it
        assert own_nbytes(client.arena.address, client.arena.nbytes) == 0
        assert host_memory.resident_file_nbytes(client.arena.own_fd) == 0
        client.arena.memory[: 1 << 20] = bytes(1 << 20)  # a write takes a copy
        assert own_nbytes(client.arena.address, client.arena.nbytes) == 1 << 20


def own_nbytes(address, nbytes):
    """Memory at these addresses that is this process's alone; what is swapped out of a file isn't counted"""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(match[1], 16) < address + nbytes and address < int(match[2], 16)
        elif inside and (match := re.match(r"Anonymous: +(\d+) kB", line)):
            found += int(match[1]) * 1024
    return found


@pytest.fixture(scope="module")
def revised_seed():
    with SeedProcess(fields={"revision": "r1"}) as seed:
        yield seed


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": "float16"}, "its dtype is float32, not float16"),
        ({"fields": {"model_name": "another"}}, "its model is toy, not another"),
        ({"fields": {"revision": "r2"}}, "its revision is r1, not r2"),
        ({"fields": {"quantization": "fp8"}}, "its quantization is none, not fp8"),
        ({"fields": {"role": "draft"}}, "rank 0 of the draft model has not registered"),
        ({"shapes": {"a": [3, 8], "b": [1000, 64]}}, r"no source has a \(a\[0:3, 7:8\]\)"),
        ({"shapes": {"a": [3, 7], "new": [1]}}, "no source has new"),
        ({"shapes": {"a": [21]}}, r"a .2 dimensions in rank 0 of the seed"),
    ],
)
@pytest.mark.parametrize("mode", ["auto", "off"])
def test_what_two_sides_disagree_on_is_refused(revised_seed, change, reason, mode):
    with pytest.raises(WeightTransferError, match=reason):
        Client(revised_seed.port, change, local_mode=mode).load()


def test_defect_6_float16_is_never_read_as_bfloat16():
    with SeedProcess(dtype="float16") as seed, pytest.raises(WeightTransferError, match="its dtype is float16"):
        Client(seed.port, {"dtype": "bfloat16"}).load()


@pytest.mark.parametrize("mode", ["auto", "off"])
@pytest.mark.parametrize("without_manifest", [False, True])
def test_another_model_of_the_same_shapes_is_told_apart_by_the_files(tmp_path, mode, without_manifest):
    with SeedProcess(without_manifest=without_manifest) as seed:
        config = {"fields": {"model_name": str(tmp_path)}}
        # No files: the shapes must do. The same weights in the files: as good.
        assert Client(seed.port, config, local_mode=mode).load(tmp_path).source != "checkpoint"
        disk_folder(tmp_path, seed.config, fill=seed.config["fill"])
        assert Client(seed.port, config, local_mode=mode).load(tmp_path).source != "checkpoint"
        disk = disk_folder(tmp_path, seed.config, fill=9)
        client = Client(seed.port, config, local_mode=mode, fallback="disk")
        report = client.load(tmp_path)
        assert report.source == "checkpoint" and "other weights than the files" in report.fallback_reason
        assert seed_process.holds(client.arena, disk)
        if not without_manifest:  # the same name on both sides says that it is meant
            assert Client(seed.port, local_mode=mode).load(tmp_path).source != "checkpoint"


@pytest.mark.parametrize("mode", ["copy", "off"])
def test_weights_that_do_not_have_their_checksums_are_not_used(tmp_path, mode):
    with SeedProcess(lie=True) as seed:
        client = Client(seed.port, local_mode=mode, fallback="disk")
        disk = disk_folder(tmp_path, client.config, fill=9)
        report = client.load(tmp_path)
        assert report.source == "checkpoint" and "verify failed" in report.fallback_reason
        assert "b" in report.fallback_reason and seed_process.holds(client.arena, disk)


def test_a_socket_that_is_gone_falls_through_to_the_network(small_seed, caplog, monkeypatch):
    def gone(*args):
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr("ramet.srt.model_loader.client.local.request_memory", gone)
    client = Client(small_seed.port, local_mode="auto")
    assert client.load().source == "transfer_engine"
    assert "its memory can't be had" in caplog.text and client.holds(small_seed.config)


def test_another_host_goes_through_the_network(small_seed, monkeypatch):
    monkeypatch.setattr("ramet.srt.model_loader.client.seed_instance.host_identity", lambda: "elsewhere")
    assert Client(small_seed.port, local_mode="auto").load().source == "transfer_engine"


# Seeds that fail


def answering(body, status=200, content_length=None, delay=None):
    """An HTTP port that gives every request the same bytes, whatever they are."""

    def answer(connection, stop):
        connection.recv(65536)
        if delay:
            head = f"HTTP/1.1 {status} x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
            for byte in head:
                if stop.wait(delay):
                    return
                connection.send(bytes([byte]))
            return
        length = len(body) if content_length is None else content_length
        connection.sendall(f"HTTP/1.1 {status} x\r\nContent-Length: {length}\r\n\r\n".encode())
        connection.sendall(body)

    return serving(answer)


GARBAGE = [
    (b"", "its answer is of no use"),
    (b"\x00\xff" * 100, "its answer is of no use"),
    (b"<html>hello</html>", "its answer is of no use"),
    (b'{"rank": 0}', "its answer is of no use"),
    (b'{"rank": 1, "remote_instance_transfer_engine_info": ["a:1", {}]}', "it is about rank 1"),
    (b'{"rank": 0, "remote_instance_transfer_engine_info": ["a:1", {"a": [-5, 21, 4]}]}', "no piece of memory"),
    (b'{"rank": 0, "remote_instance_transfer_engine_info": ["a:1", {}]}', "no source has a, b, c, d"),
    (b'{"rank": 0, "remote_instance_transfer_engine_info": ["", {}]}', "session_id is empty"),
]


@pytest.mark.parametrize(("body", "reason"), GARBAGE)
def test_garbage_is_refused_and_disk_follows(tmp_path, body, reason):
    with answering(body) as port:
        client = Client(port, fallback="disk")
        disk = disk_folder(tmp_path, client.config, fill=9)
        report = client.load(tmp_path)
        assert report.source == "checkpoint" and reason in report.fallback_reason
        assert seed_process.holds(client.arena, disk)


def test_a_session_that_nobody_answers_is_an_error():
    shapes = DEFAULTS["shapes"]
    info = {name: [4096, int(np.prod(shape)), 4] for name, shape in shapes.items()}
    body = f'{{"rank": 0, "remote_instance_transfer_engine_info": ["127.0.0.1:1", {info}]}}'.replace("'", '"').encode()
    with answering(body) as port, pytest.raises(WeightTransferError, match="transfer failed"):
        Client(port).load()


def test_a_huge_answer_is_cut_off(monkeypatch):
    monkeypatch.setattr(remote_instance_weight_loader_utils, "MAX_REGISTRATION_BYTES", 1 << 20)
    with answering(b" " * (3 << 20)) as port, pytest.raises(WeightTransferError, match="longer than 1048576 bytes"):
        Client(port).load()


def test_an_answer_that_ends_early_is_an_error():
    with answering(b"{}", content_length=100) as port, pytest.raises(WeightTransferError, match="98 bytes early"):
        Client(port, timeout_s=2.0).load()


def test_a_seed_that_is_not_there_or_not_ready_is_waited_for_in_bounds(monkeypatch):
    monkeypatch.setattr(remote_instance_weight_loader_utils, "ABSENT_GRACE_S", 0.2)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(WeightTransferError, match="it is not there"):
            Client(closed.getsockname()[1]).load()
    with answering(b"starting", status=503) as port, pytest.raises(WeightTransferError, match="503 to .*starting"):
        Client(port, timeout_s=0.6).load()
    with answering(b"what?", status=404) as port, pytest.raises(WeightTransferError, match="404 to .*what"):
        Client(port).load()
    with answering(b"", status=403) as port, pytest.raises(WeightTransferError, match="403"):
        Client(port).load()


@pytest.mark.parametrize("delay", [0.05, 1000])
def test_a_seed_that_trickles_or_is_silent_does_not_hold_the_client(delay):
    start = time.monotonic()
    with answering(b" " * 1000, delay=delay) as port, pytest.raises(WeightTransferError, match="no complete answer"):
        Client(port, timeout_s=1.0).load()
    assert time.monotonic() - start < 10


def test_without_seed_and_without_files_both_are_named(tmp_path):
    with answering(b"{") as port, pytest.raises(ValueError, match="no weights from the seed .*and none from disk .*"):
        Client(port, fallback="disk").load(tmp_path)


def test_defect_10_falling_back_is_said_and_can_be_forbidden(tmp_path, caplog):
    with answering(b"{") as port:
        client = Client(port, fallback="disk")
        disk_folder(tmp_path, client.config, fill=9)
        report = client.load(tmp_path)
        warnings = [r.message for r in caplog.records if r.levelno == logging.WARNING]
        assert len(warnings) == 1 and f"127.0.0.1:{port}" in warnings[0] and "of no use" in warnings[0]
        assert report.fallback_reason
        with pytest.raises(WeightTransferError):
            Client(port, fallback="error").load(tmp_path)


class Interrupted:
    """Does something to the seed while the third batch of a transfer is on its way."""

    def __init__(self, monkeypatch, action):
        monkeypatch.setattr(transfer_engine, "MAX_BATCH_BYTES", SMALL_BATCH)
        self.windows = []
        self.engines = []
        self.num_reads = 0
        original = TransportProcess.read

        def read(engine, session_id, local, remote, nbytes, timeout_s):
            self.num_reads += 1
            self.engines.append(engine)
            if self.num_reads == 3:
                action()
            return original(engine, session_id, local, remote, nbytes, timeout_s)

        monkeypatch.setattr(TransportProcess, "read", read)
        original_close = HostReceiveWindow.close
        monkeypatch.setattr(
            HostReceiveWindow, "close", lambda window: (self.windows.append(window), original_close(window))
        )


def test_defect_13_a_seed_that_is_killed_mid_transfer_gives_way_to_disk(tmp_path, monkeypatch):
    with SeedProcess(**BIG) as seed:
        interrupted = Interrupted(monkeypatch, seed.kill)
        client = Client(seed.port, BIG, fallback="disk", timeout_s=10)
        disk = disk_folder(tmp_path, client.config, fill=9)
        report = client.load(tmp_path)
    assert interrupted.num_reads == 3 and len(interrupted.windows) == 1
    assert report.source == "checkpoint" and "transfer failed" in report.fallback_reason
    assert seed_process.holds(client.arena, disk)
    # Refilled in place: the memory file holds one copy, and nothing else was taken.
    assert host_memory.resident_file_nbytes(client.arena.share().fd) <= client.arena.nbytes


def test_what_a_dead_seed_has_sent_is_kept_if_the_files_complete_it(tmp_path, monkeypatch):
    with SeedProcess(**BIG) as seed:
        Interrupted(monkeypatch, seed.kill)
        client = Client(seed.port, BIG, fallback="disk", timeout_s=10)
        disk = disk_folder(tmp_path, client.config, fill=seed.config["fill"])
        report = client.load(tmp_path)
    assert report.source == "transfer_engine+checkpoint" and report.verified and report.fallback_reason
    assert seed_process.holds(client.arena, disk)
    assert report.num_bytes == client.manifest.payload_nbytes


def test_a_seed_that_stalls_is_given_up_and_cannot_write_later(tmp_path, monkeypatch):
    with SeedProcess(**BIG) as seed:
        interrupted = Interrupted(monkeypatch, seed.pause)
        client = Client(seed.port, BIG, fallback="disk", timeout_s=1.5)
        disk = disk_folder(tmp_path, client.config, fill=9)
        start = time.monotonic()
        report = client.load(tmp_path)
        assert time.monotonic() - start < 15
        assert "no progress within 1.5 s" in report.fallback_reason
        assert seed_process.holds(client.arena, disk)
        # The seed comes back, and finds that whoever would have received the batch that was given up has ended.
        (engine,) = set(interrupted.engines)
        assert not os.path.exists(f"/proc/{engine.pid}")
        seed.resume()
        with SeedProcess() as another:  # it serves as well as before
            assert Client(another.port).load().verified
        assert seed_process.holds(client.arena, disk)
