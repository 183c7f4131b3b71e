"""Owns the test of whole instances that grow out of ones with other parallel sizes, launched as a user would."""

import socket

import httpx
import pytest
import random_models as rm
from server_process import ServerProcess

SEED = ("--remote-instance-weight-loader-start-seed-via-transfer-engine", "--engine-info-bootstrap-port", "0")
PROMPTS = rm.random_prompts([7, 21])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return rm.make_model(tmp_path_factory.mktemp("model"), "llama3", num_hidden_layers=4)


@pytest.fixture(scope="module")
def seed(model, tmp_path_factory):
    """Two ranks."""
    log = tmp_path_factory.mktemp("seed") / "log"
    with ServerProcess(model, log, "--tp-size", "2", *SEED, fake=False) as server:
        yield server.wait_ready()


@pytest.fixture(scope="module")
def expected(seed):
    return answers(seed)


def client_flags(*servers):
    flags = ["--load-format", "remote_instance", "--engine-info-bootstrap-port", "0"]
    for server in servers:
        flags += ["--remote-instance-weight-loader-seed-instance-ip", server.url.removeprefix("http://")]
    return [*flags, "--remote-instance-weight-loader-fallback", "error"]


def answers(server):
    params = {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True}
    body = {"input_ids": PROMPTS, "sampling_params": params}
    return [output["output_ids"] for output in httpx.post(f"{server.url}/generate", json=body, timeout=60).json()]


def reports(server):
    ranks = httpx.get(f"{server.url}/get_server_info", timeout=10).json()["ranks"]
    return [(rank["load_report"]["source"], rank["load_report"]["verified"]) for rank in ranks]


def test_an_instance_is_cloned_over_topologies(model, seed, expected, tmp_path):
    """tp2, from it tp1 over the network, and from both of them tp1 x pp2; all of them go on serving."""
    weightless = rm.without_weights(model, tmp_path / "weightless")
    off = ("--remote-instance-weight-loader-local-mode", "off")
    with ServerProcess(weightless, tmp_path / "first.log", *client_flags(seed), *off, fake=False) as first:
        first.wait_ready()
        assert reports(first) == [("transfer_engine", True)]
        assert answers(first) == expected
        flags = ("--pp-size", "2", *client_flags(first, seed))
        with ServerProcess(weightless, tmp_path / "second.log", *flags, fake=False) as second:
            second.wait_ready()
            assert reports(second) == [("local_copy", True)] * 2
            assert answers(second) == expected
        assert answers(seed) == answers(first) == expected


def test_ranks_are_sent_to_by_broadcast_while_the_seed_serves(model, seed, expected, tmp_path):
    """tp2 from tp2 with the backend nccl, over gloo: every rank of the seed is reached, the follower too."""
    weightless = rm.without_weights(model, tmp_path / "weightless")
    broadcast = ("--remote-instance-weight-loader-backend", "nccl", "--remote-instance-weight-loader-local-mode", "off")
    flags = ("--tp-size", "2", *client_flags(seed), *broadcast)
    with ServerProcess(weightless, tmp_path / "client.log", *flags, fake=False) as client:
        client.wait_ready()
        assert reports(client) == [("nccl", True)] * 2
        assert answers(client) == expected == answers(seed)
    assert seed.output.count("GB of weights in") == 2


def test_both_nodes_are_reached(model, expected, tmp_path):
    """A follower on another node computes checksums and sends broadcasts: its control socket is a TCP port then."""
    addresses = ("--dist-init-addr", f"127.0.0.1:{free_port()}", "--engine-info-bootstrap-port", str(free_port()))
    flags = ("--tp-size", "2", "--nnodes", "2", *addresses, SEED[0])
    weightless = rm.without_weights(model, tmp_path / "weightless")
    off = ("--remote-instance-weight-loader-local-mode", "off")
    with (
        ServerProcess(model, tmp_path / "node1.log", *flags, "--node-rank", "1", fake=False),
        ServerProcess(model, tmp_path / "node0.log", *flags, "--node-rank", "0", fake=False) as seed,
    ):
        seed.wait_ready()
        assert answers(seed) == expected
        ways = {"transfer_engine": (), "nccl": ("--tp-size", "2", "--remote-instance-weight-loader-backend", "nccl")}
        for source, more in ways.items():
            log = tmp_path / f"c{len(more)}.log"
            with ServerProcess(weightless, log, *client_flags(seed), *off, *more, fake=False) as client:
                client.wait_ready()
                assert set(reports(client)) == {(source, True)} and answers(client) == expected


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
