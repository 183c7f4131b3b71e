"""Instances of several nodes publish every rank, and others take their weights from it."""

import json
import socket
import urllib.request

import random_models as rm
from cluster import Case, Cluster, Network
from modelexpress_harness import wait_until
from ramet.srt.modelexpress.server.server import ModelExpressServer, ServerOptions

FLAGS = ["--load-format", "remote_instance", "--remote-instance-weight-loader-backend", "modelexpress"]
FLAGS += ["--max-total-tokens", "256", "--served-model-name", "m", "--device", "cpu", "--modelexpress-config"]


def start_server(host):
    server = ModelExpressServer(ServerOptions(host=host.address, port=0, metrics_port=0))
    server.start()
    return server


def fetch_workers(host, http_url):
    """By the instance's URL: its workers."""

    def ask():
        with urllib.request.urlopen(f"{http_url}/fleet.json", timeout=5) as response:
            return json.load(response)

    fleet = host.inside(ask)
    return {i["name"]: i["workers"] for m in fleet["models"] for i in m["instances"]}


def test_every_rank_of_every_node_is_published_and_found(tmp_path):
    model = rm.make_model(tmp_path / "model", "llama2")
    with Network(2) as network:
        server = network.hosts[0].inside(lambda: start_server(network.hosts[0]))

        def workers():
            return fetch_workers(network.hosts[0], server.http_url)

        flags = [*FLAGS, json.dumps({"url": server.address})]
        for name in ("first", "second"):
            (tmp_path / name).mkdir()
        with Cluster(Case(nnodes=2, tp_size=2), network.hosts, model, tmp_path / "first", *flags) as first:
            first.wait_ready()
            wait_until(lambda: [w["status"] for one in workers().values() for w in one] == ["READY"] * 2, 20)
            assert list(workers()) == [f"http://{network.hosts[0].address}:{first.head.port}"]
            with Cluster(Case(tp_size=2), network.hosts, model, tmp_path / "second", *flags) as second:
                second.wait_ready()
                ranks = second.head.request("/get_server_info")[1]["ranks"]
                reports = [rank["load_report"] for rank in ranks]
                assert [report["source"] for report in reports if report["verified"]][0] == "local_map"
                assert all(report["verified"] and report["taken_from"] for report in reports), reports
                assert second.head.generate([5, 6, 7], 8) == first.head.generate([5, 6, 7], 8)
            first.head.process.terminate()
            assert first.head.process.wait(30) == 0
            url = f"http://{network.hosts[0].address}:{first.head.port}"
            assert [worker["status"] for worker in workers()[url]] == ["STALE"] * 2
        server.close(0.5)


def test_the_embedded_server_is_for_the_ranks_of_every_node(tmp_path):
    """It runs in node 0's head process; the ranks of node 1 publish there too, and another instance finds both."""
    model = rm.make_model(tmp_path / "model", "llama2")
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    with Network(2) as network:
        head = network.hosts[0]
        port = free_port_pair(head)
        http_url = f"http://{head.address}:{port + 1}"
        flags = [*FLAGS, json.dumps({"url": f"embedded:{port}"})]
        with Cluster(Case(nnodes=2, tp_size=2), network.hosts, model, tmp_path / "first", *flags) as first:
            first.wait_ready()
            url = f"http://{head.address}:{first.head.port}"

            def find_published():
                found = fetch_workers(head, http_url).get(url, [])
                return found if [worker["status"] for worker in found] == ["READY"] * 2 else None

            published = wait_until(find_published, 20, "both ranks being READY")
            assert sorted(worker["worker_rank"] for worker in published) == [0, 1]
            assert "embedded ModelExpress server at" in first.head.output
            assert f"using the ModelExpress server at {head.address}:{port}" in first.nodes[1].output
            with Cluster(Case(), network.hosts, model, tmp_path / "second", *flags) as second:
                second.wait_ready()
                assert f"using the ModelExpress server at {head.address}:{port}" in second.head.output
                wait_until(lambda: len(fetch_workers(head, http_url)) == 2, what="the second instance's record")
                report = second.head.request("/get_server_info")[1]["ranks"][0]["load_report"]
                assert report["verified"], report
                assert set(report["taken_from"]) == {worker["worker_id"] for worker in published}
                answer = first.head.generate([5, 6, 7], 8)
                assert second.head.generate([5, 6, 7], 8) == answer
                first.head.process.terminate()
                assert first.head.process.wait(30) == 0
                assert second.head.generate([5, 6, 7], 8) == answer


def free_port_pair(host):
    """A free port with a free one after it: the fleet page's."""

    def probe():
        for _ in range(100):
            with socket.socket() as one, socket.socket() as other:
                one.bind((host.address, 0))
                port = one.getsockname()[1]
                try:
                    other.bind((host.address, port + 1))
                except (OSError, OverflowError):
                    continue
                return port
        raise RuntimeError("no two ports in a row are free")

    return host.inside(probe)
