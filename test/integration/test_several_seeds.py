"""Owns the tests of taking weights from several seeds at once, some of which fail or have something else."""

import socket
from types import SimpleNamespace

import numpy as np
import pytest
import seed_process
from ramet.srt.configs.load_config import LoadConfig
from ramet.srt.model_loader.arena.allocate import allocate_arena
from ramet.srt.model_loader.client import seeds_by_address, transfer, transfer_engine
from ramet.srt.model_loader.loader import get_model_loader
from ramet.srt.model_loader.remote_instance_weight_loader_utils import SeedServer, fetch_seed_answer
from ramet.srt.model_loader.transport.transport_process import TransportProcess
from ramet.srt.utils.net import SeedAddress
from ramet.srt.weights.errors import WeightTransferError
from ramet.srt.weights.report import summarize
from safetensors.numpy import save_file
from seed_process import DEFAULTS, SeedProcess

BIG = {"shapes": {f"w{i}": [4 << 20] for i in range(6)}}  # 96 MB of float32
BATCH = 8 << 20


class Client:
    """What a starting instance does with its weights."""

    def __init__(self, *ports, config=None, **options):
        self.manifest = seed_process.make_manifest(DEFAULTS | (config or {}))
        self.arena = allocate_arena(self.manifest, "cpu")
        options = {"timeout_s": 20.0, "fallback": "error", "local_mode": "off"} | options
        seeds = tuple(SeedAddress("127.0.0.1", port) for port in ports)
        self.loader = get_model_loader(LoadConfig(load_format="remote_instance", seeds=seeds, **options))

    def load(self, folder="/nonexistent"):
        return self.loader.load_weights(self.manifest, self.arena, str(folder)).report

    def holds(self, config):
        return seed_process.holds(self.arena, seed_process.make_tensors(config))


@pytest.fixture
def reads(monkeypatch):
    """Small batches; what is read from each session; `on_read` is called with the session before each."""
    monkeypatch.setattr(transfer_engine, "MAX_BATCH_BYTES", BATCH)
    monkeypatch.setattr(transfer, "SHARED_BYTES", BATCH)

    seen = SimpleNamespace(nbytes={}, on_read=lambda session: None)
    original = TransportProcess.read

    def read(engine, session_id, local, remote, nbytes, timeout_s):
        seen.on_read(session_id)
        original(engine, session_id, local, remote, nbytes, timeout_s)
        seen.nbytes[session_id] = seen.nbytes.get(session_id, 0) + sum(nbytes)

    monkeypatch.setattr(TransportProcess, "read", read)
    return seen


def closed_port():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        return closed.getsockname()[1]


def test_two_seeds_share_the_work(reads):
    with SeedProcess(**BIG) as one, SeedProcess(**BIG) as two:
        client = Client(one.port, two.port, config=BIG)
        report = client.load()
        assert client.holds(one.config) and report.verified and report.source == "transfer_engine"
        assert set(report.taken_from) == {f"127.0.0.1:{seed.port}" for seed in (one, two)}
    assert sorted(report.taken_bytes) == sorted(reads.nbytes.values()) and len(reads.nbytes) == 2
    assert min(reads.nbytes.values()) > 0.4 * sum(reads.nbytes.values())


def test_the_share_of_a_seed_that_dies_goes_to_the_other(reads, caplog):
    with SeedProcess(**BIG) as one, SeedProcess(**BIG) as two:
        sessions = []
        first = fetch_seed_answer(SeedServer(SeedAddress("127.0.0.1", one.port)), 0, "target", 10).session_id

        def kill_first(session):
            sessions.append(session)
            if session == first and sessions.count(first) == 3:
                one.kill()

        reads.on_read = kill_first
        client = Client(one.port, two.port, config=BIG, timeout_s=5)
        report = client.load()
        assert client.holds(two.config) and report.verified and not report.fallback_reason
    assert f"127.0.0.1:{one.port} failed, its share goes to 127.0.0.1:{two.port}" in caplog.text


def test_what_is_left_when_all_seeds_have_died_comes_from_disk(tmp_path, reads):
    with SeedProcess(**BIG) as one, SeedProcess(**BIG) as two:
        sessions = []

        def kill_both(session):
            sessions.append(session)
            if all(sessions.count(each) > 2 for each in sessions) and len(set(sessions)) == 2:  # both have given some
                reads.on_read = lambda session: None
                one.kill()
                two.kill()

        reads.on_read = kill_both
        client = Client(one.port, two.port, config=BIG, timeout_s=5, fallback="disk")
        write_files(tmp_path, one.config)
        report = client.load(tmp_path)
        assert client.holds(one.config) and report.verified
    assert report.source == "transfer_engine+checkpoint"
    seeds = [f"127.0.0.1:{one.port}", f"127.0.0.1:{two.port}"]
    assert all(seed in report.fallback_reason for seed in seeds)
    assert sorted(report.taken_from) == sorted(seeds)
    assert all(report.taken_bytes) and sum(report.taken_bytes) < report.num_bytes == client.manifest.payload_nbytes
    for seed, num_bytes in zip(report.taken_from, report.taken_bytes, strict=True):
        assert f"; {num_bytes / 1e9:.3f} GB from {seed}" in summarize(report)


def write_files(folder, config):
    tensors = seed_process.make_tensors(config)
    shapes = config["shapes"]
    save_file({name: tensors[name].view(np.float32).reshape(shapes[name]) for name in shapes}, folder / "m.safetensors")


def test_a_seed_that_is_not_there_is_left_out(reads, caplog):
    with SeedProcess() as seed:
        absent = closed_port()
        client = Client(absent, seed.port)
        assert client.load().verified and client.holds(seed.config)
    assert f"the seed 127.0.0.1:{absent} is left out" in caplog.text


def test_no_seed_at_all_names_each(monkeypatch):
    monkeypatch.setattr("ramet.srt.model_loader.remote_instance_weight_loader_utils.ABSENT_GRACE_S", 0.2)
    ports = closed_port(), closed_port()
    with pytest.raises(WeightTransferError, match=f"{ports[0]}.*not there.*{ports[1]}.*not there"):
        Client(*ports).load()


def test_a_seed_with_other_weights_is_left_out(reads, caplog):
    with SeedProcess() as one, SeedProcess(fill=2) as other:
        client = Client(one.port, other.port)
        assert client.load().verified and client.holds(one.config)
    assert "its weights are not those of" in caplog.text and len(reads.nbytes) == 1


def test_a_seed_of_another_model_is_left_out(caplog):
    with SeedProcess(fields={"model_name": "another"}) as other, SeedProcess() as seed:
        client = Client(other.port, seed.port)
        assert client.load().verified and client.holds(seed.config)
    assert "its model is another, not toy" in caplog.text


def test_what_a_lying_seed_has_sent_is_taken_from_the_other():
    with SeedProcess(lie=True) as liar, SeedProcess() as seed:
        client = Client(liar.port, seed.port)
        assert client.load().verified and client.holds(seed.config)


def test_a_seed_on_this_host_is_taken_before_one_behind_a_network(reads):
    with SeedProcess() as one, SeedProcess() as two:
        client = Client(one.port, two.port, local_mode="copy")
        report = client.load()
        assert report.source == "local_copy" and client.holds(one.config)
        assert set(report.taken_from) <= {f"127.0.0.1:{seed.port}" for seed in (one, two)} and report.taken_from
    assert not reads.nbytes


def test_a_slow_seed_is_not_waited_for_once_another_has_answered(monkeypatch):
    monkeypatch.setattr(seeds_by_address, "LATE_GRACE_S", 0.1)
    with SeedProcess() as seed, socket.create_server(("127.0.0.1", 0)) as silent:
        client = Client(silent.getsockname()[1], seed.port)
        assert client.load().verified and client.holds(seed.config)
