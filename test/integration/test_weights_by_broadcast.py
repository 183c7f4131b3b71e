"""Owns the tests of the backend nccl, over gloo: pairs of ranks, ports, deadlines, and peers of upstream's kind."""

import datetime
import gc
import json
import os
import socket
import subprocess
import sys
import threading
import time

import httpx
import msgspec
import pytest
import seed_process
import server_process
import torch
import torch.distributed as dist
from ramet.srt.distributed import pair_group
from ramet.srt.distributed.pair_group import PairGroup, connect
from ramet.srt.distributed.rendezvous import Rendezvous
from ramet.srt.entrypoints.routes import weights as weight_routes
from ramet.srt.model_loader.arena.allocate import allocate_arena
from ramet.srt.model_loader.client import collective, transfer
from ramet.srt.model_loader.seed import send_groups
from ramet.srt.model_loader.transport import broadcast_steps
from ramet.srt.model_loader.transport.broadcast_steps import (
    make_broadcast_steps,
    pack,
    source_rows,
    target_rows,
    unpack,
)
from ramet.srt.model_loader.transport.listening_address import listeners
from ramet.srt.weights.manifest import layout_digest
from ramet.srt.weights.planner import ArenaSource, plan
from ramet.srt.weights.registration import InitSendGroupBody
from seed_server import SeedServer, load_all, take, write_random_model
from torch.distributed.distributed_c10d import _new_process_group_helper

BROADCAST = {"backend": "nccl", "local_mode": "off"}
PAIRS = {
    "tp2pp2-same": ({"tp_size": 2, "pp_size": 2}, {"tp_size": 2, "pp_size": 2}),
    "tp2-tp1": ({"tp_size": 2}, {}),
    "tp1-tp4": ({}, {"tp_size": 4}),
}


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory):
    return write_random_model(tmp_path_factory.mktemp("dense"), "llama3", dtype="bfloat16", num_hidden_layers=4)


@pytest.fixture(scope="module")
def experts_folder(tmp_path_factory):
    return write_random_model(tmp_path_factory.mktemp("experts"), "qwen3_moe", num_experts=8)


@pytest.mark.parametrize("pair", PAIRS)
def test_broadcasts_give_what_a_load_from_disk_gives(dense_folder, pair):
    seed_sizes, client_sizes = PAIRS[pair]
    with SeedServer(load_all(dense_folder, seed_sizes)) as server:
        for expected in load_all(dense_folder, client_sizes):
            arena, report = take(expected.manifest, server, **BROADCAST)
            assert arena.memory == expected.memory
            assert report.verified and report.source == "nccl"


def test_a_load_is_few_broadcasts(dense_folder, monkeypatch):
    (whole,) = load_all(dense_folder, {})
    result = plan(whole.manifest, [ArenaSource("seed", whole.manifest)])
    assert len(list(make_broadcast_steps(result.ops))) == 1 and len(whole.manifest.entries) > 20


def test_packed_rows_arrive_where_they_belong(experts_folder):
    seeds = load_all(experts_folder, {"tp_size": 4, "ep_size": 2})
    (expected,) = load_all(experts_folder, {})
    sources = [ArenaSource(str(rank), seed.manifest) for rank, seed in enumerate(seeds)]
    result = plan(expected.manifest, sources)
    memory = torch.zeros(expected.nbytes, dtype=torch.uint8)
    for rank, seed in enumerate(seeds):
        for step in make_broadcast_steps(result.of_source(rank)):
            unpack(pack(source_rows(step), seed.byte_tensor()).clone(), target_rows(step), memory)
    assert torch.equal(memory, expected.byte_tensor())


class BodyWithoutWarmUp(InitSendGroupBody, frozen=True, kw_only=True, omit_defaults=True):
    """As an older instance's."""

    def __post_init__(self):
        msgspec.structs.force_setattr(self, "warm_up", False)


@pytest.fixture
def warmed_up(monkeypatch):
    """The sides that have sent or received the warm-up's byte: the seed's is 0, the client's 1."""
    sides, make, warm_up = [], PairGroup.__init__, PairGroup.warm_up

    def init(self, store, name, rank, *rest):
        self.side = rank
        make(self, store, name, rank, *rest)

    monkeypatch.setattr(PairGroup, "__init__", init)
    monkeypatch.setattr(PairGroup, "warm_up", lambda self: (sides.append(self.side), warm_up(self)))
    return sides


@pytest.mark.parametrize("older", ["seed", "client", "none"])
def test_nobody_warms_up_alone(dense_folder, older, warmed_up, monkeypatch):
    with SeedServer(load_all(dense_folder, {})) as server:
        if older != "none":
            kinds = {"seed": weight_routes, "client": collective}
            monkeypatch.setattr(kinds[older], "InitSendGroupBody", BodyWithoutWarmUp)
        (expected,) = server.arenas
        arena, report = take(expected.manifest, server, **BROADCAST, timeout_s=10.0)
        assert report.verified and report.source == "nccl" and arena.memory == expected.memory
    assert sorted(warmed_up) == ([0, 1] if older == "none" else [])


# Failures


def init_body(server, **changes):
    manifest = server.arenas[0].manifest
    whole = [[(0, manifest.arena_nbytes, 1, 0)]]
    body = {"rank": 0, "backend": "gloo", "broadcasts": whole, "layout": layout_digest(manifest), "timeout_s": 5.0}
    return body | changes


def post(server, path, body):
    return httpx.post(f"http://127.0.0.1:{server.port}/{path}", json=body, timeout=30)


def init(server, **changes):
    return post(server, "init_weights_send_group_for_remote_instance", init_body(server, **changes)).json()


@pytest.fixture
def tp1_server(dense_folder):
    with SeedServer(load_all(dense_folder, {})) as server:
        yield server


def is_free(port):
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return probe.connect_ex(("127.0.0.1", port)) != 0


def wait_for(condition, timeout_s=15):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_defect_4_no_step_waits_for_ever_and_names_come_from_the_seed(tp1_server, monkeypatch):
    """Neither side computes a name from a host's name: a wrong idea of the own name changes nothing."""
    monkeypatch.setattr(socket, "gethostname", lambda: "another-name")
    answers = [init(tp1_server, timeout_s=0.5) for _ in range(2)]
    ids = {answer["transfer_id"] for answer in answers}
    assert len(ids) == 2 and all(answer["success"] for answer in answers)
    # Nobody comes: both are given up, their ports are given back, and asking for them afterwards is an error.
    wait_for(lambda: all(is_free(int(answer["ports"])) for answer in answers))
    late = post(tp1_server, "send_weights_to_remote_instance", {"rank": 0, "group_name": ids.pop()})
    assert late.status_code == 400 and not late.json()["success"] and "has not come" in late.json()["message"]
    unknown = post(tp1_server, "send_weights_to_remote_instance", {"rank": 0, "group_name": "no such"})
    assert "no transfer" in unknown.json()["message"]
    (expected,) = tp1_server.arenas
    assert take(expected.manifest, tp1_server, **BROADCAST)[1].verified


def test_defect_5_ports_are_the_kernel_s_and_a_taken_one_is_named(tp1_server):
    answers = [init(tp1_server, timeout_s=1.0) for _ in range(8)]
    assert len({answer["ports"] for answer in answers}) == 8
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused = init(tp1_server, ports=str(port))
        assert not refused["success"] and f"port {port} " in refused["message"]


def test_a_given_list_of_ports_is_used(tp1_server, monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    seen = []
    original = send_groups.listen
    monkeypatch.setattr(send_groups, "listen", lambda host, port: seen.append(port) or original(host, port))
    (expected,) = tp1_server.arenas
    options = BROADCAST | {"send_weights_group_ports": (port,)}
    for _ in range(2):  # given back after the first
        arena, report = take(expected.manifest, tp1_server, **options)
        assert report.verified and arena.memory == expected.memory
    assert seen == [port, port]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"backend": "nccl"}, "can't send from cpu"),
        ({"layout": "x"}, "another layout"),
        ({"broadcasts": [[(0, 1 << 40, 1, 0)]]}, "outside of the weights"),
        ({"broadcasts": [[(-8, 8, 1, 0)]]}, "outside of the weights"),
        ({"timeout_s": 0}, "timeout_s must be"),
        ({"world_size": 3}, "group of 2"),
        ({"rank": 7}, "rank 7 of 'target' has not registered"),
        ({"ports": "http"}, "ports must be"),
        ({"rank": None, "group_name": "g", "ports": "1,2"}, "1 tensor-parallel ranks"),
        ({"rank": None, "ports": "1"}, "group_name is empty"),
        ({"broadcasts": 3}, "can't be used"),
    ],
)
def test_requests_that_make_no_sense_are_refused(tp1_server, changes, reason):
    answer = init(tp1_server, **changes)
    assert answer["success"] is False and reason in answer["message"]


def test_a_rank_sends_to_so_many_at_once(tp1_server, monkeypatch):
    monkeypatch.setattr(send_groups, "MAX_TRANSFERS", 2)
    answers = [init(tp1_server, timeout_s=1.0) for _ in range(3)]
    assert [answer["success"] for answer in answers] == [True, True, False]
    wait_for(lambda: init(tp1_server, timeout_s=0.2)["success"])


def test_three_hundred_requests_that_nobody_follows_up_keep_no_client_waiting(tp1_server, monkeypatch):
    """Nor do they make the rank look as if it had gone. The next client takes the place of one that doesn't come."""
    monkeypatch.setattr(send_groups, "CONNECT_TIMEOUT_S", 8.0)
    url = f"http://127.0.0.1:{tp1_server.port}/init_weights_send_group_for_remote_instance"
    bodies = [{"group_name": f"strange{i}", "ports": "0", "timeout_s": 600, "backend": "gloo"} for i in range(300)]
    answers = []

    client = httpx.Client(timeout=120, limits=httpx.Limits(max_connections=300))
    threads = [
        threading.Thread(target=lambda body=body: answers.append(client.post(url, json=body)), daemon=True)
        for body in bodies
    ]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(answers) >= 300 - send_groups.MAX_TRANSFERS)
    (expected,) = tp1_server.arenas
    start = time.monotonic()
    assert take(expected.manifest, tp1_server, **BROADCAST)[1].verified
    assert time.monotonic() - start < 15
    refused = [answer for answer in answers if answer.status_code == 503]
    assert refused and all("try again in a moment" in answer.text for answer in refused)
    assert not any("gone" in answer.text for answer in answers)
    for thread in threads:  # those who were let in end with the time that a client has to connect
        thread.join(60)
        assert not thread.is_alive()


def test_a_store_listens_at_its_own_address(tp1_server):
    answer = init(tp1_server, timeout_s=1.0)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", int(answer["ports"])), 5)
    for host in ("127.0.0.1", "::1"):
        listener = pair_group.listen(host, 0)
        store = pair_group.open_store(listener, host, 5)
        assert {one.address for one in listeners() if one.port == store.port} == {host}
        connect(host, store.port, 5).set("a", "b")
        assert store.get("a") == b"b"


def test_the_ranks_store_listens_at_the_address_that_was_given():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    meeting = Rendezvous(f"127.0.0.1:{port}", 0, 2, 2, 10)
    assert {one.address for one in listeners() if one.port == port} == {"127.0.0.1"}
    meeting.put("a", "b")
    assert meeting.await_announcement("a", 1) == "b"
    with pytest.raises(ValueError, match=r"can't listen on 192\.0\.2\.1:80 \(--dist-init-addr\)"):
        Rendezvous("192.0.2.1:80", 0, 2, 2, 10)
    meeting.close()


def test_a_client_that_has_met_and_asks_for_nothing_is_given_up(tp1_server):
    answer = init(tp1_server, timeout_s=1.0)
    join = Peer(int(answer["ports"]), answer["transfer_id"])
    wait_for(lambda: is_free(int(answer["ports"])))
    late = post(tp1_server, "send_weights_to_remote_instance", {"rank": 0, "group_name": answer["transfer_id"]})
    assert "asked for nothing" in late.json()["message"]
    join.close()


class Peer:
    """A client's side that is made with torch's own group of a name, as upstream makes it."""

    def __init__(self, port, name):
        store = dist.PrefixStore(name, connect("127.0.0.1", port, 10))
        backend = dist.Backend("gloo")
        self.group, _ = _new_process_group_helper(
            2, 1, [], backend, store, group_name=name, timeout=datetime.timedelta(seconds=10)
        )
        dist.distributed_c10d._world.pg_group_ranks[self.group] = {0: 0, 1: 1}

    def close(self):
        dist.destroy_process_group(self.group)
        self.group = None
        gc.collect()


def test_an_upstream_client_gets_every_parameter(dense_folder):
    """What upstream's client does: both requests from a thread, torch's own group, a barrier, tensor by tensor."""
    with SeedServer(load_all(dense_folder, {"tp_size": 2})) as server:
        ports = []
        for _ in range(2):
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                ports.append(probe.getsockname()[1])
        joined = ",".join(map(str, ports))
        base = {"master_address": "127.0.0.1", "ports": joined, "group_name": "send_weights_10.0.0.7"}
        answers = []

        def request(path, **more):
            answers.append(post(server, path, base | more).json())

        init_thread = threading.Thread(
            target=request,
            args=("init_weights_send_group_for_remote_instance",),
            kwargs={"group_rank": 0, "world_size": 2, "backend": "gloo"},
        )
        init_thread.start()
        peers = []
        for rank, port in enumerate(ports):
            wait_for(lambda port=port: not is_free(port))
            peers.append(Peer(port, f"send_weights_10.0.0.7_{port}_{rank}"))
        barriers = [threading.Thread(target=dist.barrier, kwargs={"group": peer.group}) for peer in peers]
        for barrier in barriers:
            barrier.start()
        for barrier in (*barriers, init_thread):
            barrier.join(20)
        send_thread = threading.Thread(target=request, args=("send_weights_to_remote_instance",))
        send_thread.start()
        for peer, arena in zip(peers, server.arenas, strict=True):
            for entry in arena.manifest.entries:
                tensor = torch.empty(entry.shape, dtype=getattr(torch, entry.dtype))
                dist.broadcast(tensor, 0, group=peer.group)
                assert torch.equal(tensor, arena.tensor(entry)), entry.name
        send_thread.join(20)
        for peer in peers:
            peer.close()
        assert [answer["success"] for answer in answers] == [True, True]


def test_a_seed_of_upstream_s_kind_gives_every_parameter(dense_folder):
    """Our client and a seed that knows upstream's two routes and nothing else; it is not compared with anything."""
    hidden = ("/remote_instance_transfer_engine_info", "/get_remote_instance_transfer_engine_info")
    with SeedServer(load_all(dense_folder, {"tp_size": 2}), hidden=hidden) as server:
        with socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", 0))
            two.bind(("127.0.0.1", 0))
            ports = one.getsockname()[1], two.getsockname()[1]
        options = BROADCAST | {"send_weights_group_ports": ports}
        results = {}

        def load(rank):
            results[rank] = take(server.arenas[rank].manifest, server, **options)

        threads = [threading.Thread(target=load, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        for rank, (arena, report) in results.items():
            assert arena.memory == server.arenas[rank].memory and not report.verified
        assert len(results) == 2
        # The names and ports are free again: a client that starts anew uses the same ones.
        wait_for(lambda: all(is_free(port) for port in ports))
        threads = [threading.Thread(target=load, args=(rank,)) for rank in range(2)]
        results.clear()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert len(results) == 2


BIG = seed_process.DEFAULTS | {"shapes": {f"w{i}": [4 << 20] for i in range(4)}}  # 64 MB of float32


def run_client(port, how, at, timeout_s):
    """A client process that gets a signal at its `at`-th broadcast; one that is stopped goes on never."""
    code = f"""
import json, os, signal, sys
import seed_process
from types import SimpleNamespace
from ramet.srt.distributed.pair_group import PairGroup
from ramet.srt.model_loader.transport import broadcast_steps
from seed_server import take

broadcast_steps.DIRECT_BYTES = 4 << 20
original, count = PairGroup.broadcast, 0

def broadcast(self, tensor):
    global count
    count += 1
    if count == {at}:
        os.kill(os.getpid(), signal.{how})
    original(self, tensor)

PairGroup.broadcast = broadcast
manifest = seed_process.make_manifest(json.loads(sys.argv[1]))
take(manifest, SimpleNamespace(port={port}), backend="nccl", local_mode="off", timeout_s={timeout_s})
"""
    paths = os.pathsep.join([str(server_process.PYTHON_FOLDER), str(server_process.TEST_FOLDER)])
    return subprocess.Popen([sys.executable, "-c", code, json.dumps(BIG)], env={**os.environ, "PYTHONPATH": paths})


@pytest.fixture
def big_server():
    arena = allocate_arena(seed_process.make_manifest(BIG), "cpu")
    seed_process.fill_arena(arena, seed_process.make_tensors(BIG))
    with SeedServer([arena]) as server:
        yield server


@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
def test_a_client_that_disappears_half_way_leaves_the_seed_able_to_serve_the_next(big_server, how, caplog):
    timeout_s = {"SIGKILL": 300.0, "SIGSTOP": 5.0}[how]  # one that is stopped is found by the deadline alone
    client = run_client(big_server.port, how, 4, timeout_s)
    try:
        wait_for(lambda: "the weights were not sent" in caplog.text, 60)
        (expected,) = big_server.arenas
        arena, report = take(expected.manifest, big_server, **BROADCAST)
        assert report.verified and arena.memory == expected.memory
    finally:
        client.kill()
        client.wait(10)


def test_a_seed_that_dies_half_way_gives_way_to_the_next(big_server, monkeypatch, caplog):
    """The first of two seeds breaks the group off; the ranges that it has not sent come from the other."""
    monkeypatch.setattr(broadcast_steps, "DIRECT_BYTES", 4 << 20)
    monkeypatch.setattr(transfer, "SHARED_BYTES", 4 << 20)
    (expected,) = big_server.arenas
    original = send_groups._Transfer._tensors
    broken = []

    def tensors(self):
        for number, tensor in enumerate(original(self)):
            if number == 2 and not broken:
                broken.append(self)
                raise OSError("the cable was pulled")
            yield tensor

    monkeypatch.setattr(send_groups._Transfer, "_tensors", tensors)
    second = allocate_arena(expected.manifest, "cpu")
    seed_process.fill_arena(second, seed_process.make_tensors(BIG))
    with SeedServer([second]) as other_server:
        arena, report = take(expected.manifest, big_server, other_server, **BROADCAST)
    assert report.verified and arena.memory == expected.memory and broken
    assert "failed, its share goes to" in caplog.text and "the cable was pulled" in caplog.text
