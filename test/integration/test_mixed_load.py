"""Streams that go on while long prompts are computed, in one pass with them, from every kind of topology."""

import json
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import random_models as rm
from cluster import Case, Cluster, Network, Node, usual_or_all

SHORT, LONG = rm.random_prompts([3, 9, 12, 7]), rm.random_prompts([200, 130, 90], seed=1)
NUM_SHORT, NUM_LONG = 90, 6
TOPOLOGIES = {
    "one rank": Case(),
    "tp2": Case(tp_size=2),
    "pp2": Case(pp_size=2),
    "dp_attention2": Case(tp_size=2, dp_size=2, dp_attention=True),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]], list[list[int]]]:
    folder = rm.make_model(tmp_path_factory.mktemp("model"), "qwen3_moe", num_hidden_layers=4)
    return folder, rm.hf_greedy(folder, SHORT, NUM_SHORT), rm.hf_greedy(folder, LONG, NUM_LONG)


def stream(node: Node, input_ids: list[int], begun: threading.Semaphore) -> list[int]:
    """The greedy continuation, token by token; `begun` is released with the first."""
    params = {"max_new_tokens": NUM_SHORT, "temperature": 0, "ignore_eos": True}
    body = json.dumps({"input_ids": input_ids, "sampling_params": params, "stream": True}).encode()
    url = f"http://{node.host.address}:{node.port}/generate"
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    output_ids: list[int] = []
    with urllib.request.urlopen(request, timeout=60) as response:
        for line in response:
            if line.startswith(b"data: {"):
                if not output_ids:
                    begun.release()
                output_ids = json.loads(line[6:])["output_ids"]
    return output_ids


@pytest.mark.parametrize("name", usual_or_all(("pp2", "dp_attention2"), ("one rank", "tp2")))
def test_the_same_tokens_whatever_the_company(model, tmp_path: Path, name: str) -> None:
    folder, short, long = model
    flags = ["--chunked-prefill-size", "24"]
    with Network(1) as network, Cluster(TOPOLOGIES[name], network.hosts, folder, tmp_path, *flags) as cluster:
        cluster.wait_ready()
        begun = threading.Semaphore(0)
        with ThreadPoolExecutor() as pool:
            streams = [
                pool.submit(network.hosts[0].inside, lambda p=prompt: stream(cluster.head, p, begun))
                for prompt in SHORT
            ]
            assert all(begun.acquire(timeout=60) for _ in streams)
            answers = list(pool.map(lambda prompt: cluster.head.generate(prompt, NUM_LONG), LONG))
            assert [one.result() for one in streams] == short
        assert answers == long
