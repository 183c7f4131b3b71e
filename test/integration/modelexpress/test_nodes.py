"""Instances of several nodes publish every rank, and others take their weights from it."""

import json
import urllib.request

import random_models as rm
from cluster import Case, Cluster, Network
from modelexpress_harness import wait_until
from ramet.srt.modelexpress.server import ModelExpressServer, ServerOptions

FLAGS = ["--load-format", "remote_instance", "--remote-instance-weight-loader-backend", "modelexpress"]
FLAGS += ["--max-total-tokens", "256", "--served-model-name", "m", "--device", "cpu", "--modelexpress-config"]


def start_server(host):
    server = ModelExpressServer(ServerOptions(host=host.address, port=0, metrics_port=0))
    server.start()
    return server


def test_every_rank_of_every_node_is_published_and_found(tmp_path):
    model = rm.make_model(tmp_path / "model", "llama2")
    with Network(2) as network:
        server = network.hosts[0].inside(lambda: start_server(network.hosts[0]))

        def workers():
            def ask():
                with urllib.request.urlopen(f"{server.http_url}/fleet.json", timeout=5) as response:
                    return json.load(response)

            fleet = network.hosts[0].inside(ask)
            return {i["name"]: i["workers"] for m in fleet["models"] for i in m["instances"]}

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
