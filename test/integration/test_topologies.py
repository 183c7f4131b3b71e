"""The same greedy tokens from every topology, all ranks findable, and an end on every node when one is lost."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import random_models as rm
from cluster import CASES, Case, Cluster, Network, check_registrations, usual_or_all
from server_process import wait_until

PROMPTS = rm.random_prompts([3, 40, 17])
NUM_TOKENS = 8
SEED = "--remote-instance-weight-loader-start-seed-via-transfer-engine"
LOSS_TIMEOUT_S = 30
LONG_NUM_TOKENS = 100
TOLD_TO_END = {"tp4_nodes2": (1, 0), "dp2_tp2_nodes2": (0, 1), "pp2_tp2_nodes2": (1,)}  # in which order; node 0 else

SINGLE_NODE = {  # what is split in one way alone is in the tests of updates, of experts and of clones, too
    "tp2_pp2": Case(tp_size=2, pp_size=2),
    "dp2_tp2": Case(dp_size=2, tp_size=2),
    "ep2": Case(tp_size=2, ep_size=2),
    "dp_attention2": Case(tp_size=2, dp_size=2, ep_size=2, dp_attention=True),
    "dp_attention2_tp4": Case(tp_size=4, dp_size=2, dp_attention=True),
}
NAMES = usual_or_all(
    ("dp_attention2", "dp_attention2_tp4", "tp4_nodes2", "dp2_tp2_nodes2", "pp2_tp2_nodes2"),
    ("tp2_pp2", "dp2_tp2", "ep2", "dp2_single_node"),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]]]:
    folder = rm.make_model(tmp_path_factory.mktemp("model"), "qwen3_moe", num_hidden_layers=4)
    return folder, rm.hf_greedy(folder, PROMPTS, NUM_TOKENS)


def assert_answers(cluster: Cluster, expected: list[list[int]]) -> None:
    for _ in range(2):  # over every replica, and with a warm prefix cache
        assert [cluster.head.generate(prompt, NUM_TOKENS) for prompt in PROMPTS] == expected
    with ThreadPoolExecutor() as pool:  # all at once: several micro-batches, several attention groups in one pass
        answers = pool.map(lambda prompt: cluster.head.generate(prompt, NUM_TOKENS), PROMPTS * 3)
        assert list(answers) == expected * 3


@pytest.mark.parametrize("name", NAMES)
def test_tokens_and_registrations(model, tmp_path: Path, name: str) -> None:
    folder, expected = model
    case = SINGLE_NODE.get(name) or CASES[name]
    with Network(case.nnodes) as network:
        with Cluster(case, network.hosts, folder, tmp_path, SEED) as cluster:
            cluster.wait_ready()
            assert_answers(cluster, expected)
            check_registrations(cluster.head, case)
            everyone = [pid for node in cluster.nodes for pid in node.descendants()]
            with ThreadPoolExecutor() as pool:
                long = pool.submit(cluster.head.generate, PROMPTS[0], LONG_NUM_TOKENS)
                wait_until(
                    lambda: any(one["num_tokens"] for one in cluster.head.request("/get_load")[1]),
                    "the long request",
                    20,
                )
                for number in TOLD_TO_END.get(name, (0,)):
                    cluster.nodes[number].process.send_signal(signal.SIGTERM)
                    time.sleep(0.3)  # as far apart as a controller that deletes pods tells them
                assert len(long.result()) == LONG_NUM_TOKENS
            assert [node.process.wait(LOSS_TIMEOUT_S) for node in cluster.nodes] == [0] * case.nnodes
        assert not [pid for pid in everyone if Path(f"/proc/{pid}").exists()]


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_node_ends_the_instance(model, tmp_path: Path, lost: int) -> None:
    folder, _ = model
    with Network(2) as network, Cluster(Case(nnodes=2, tp_size=2), network.hosts, folder, tmp_path) as cluster:
        cluster.wait_ready()
        survivor = cluster.nodes[1 - lost]
        everyone = survivor.descendants()
        cluster.nodes[lost].kill()
        start = time.monotonic()
        assert survivor.process.wait(LOSS_TIMEOUT_S) == 1
        assert time.monotonic() - start < LOSS_TIMEOUT_S
        assert f"node {lost}" in survivor.output
        assert not [pid for pid in everyone if Path(f"/proc/{pid}").exists()]


def test_a_lost_rank_ends_the_instance(model, tmp_path: Path) -> None:
    folder, _ = model
    with Network(1) as network, Cluster(Case(tp_size=2), network.hosts, folder, tmp_path) as cluster:
        cluster.wait_ready()
        victim = next(
            pid for pid in cluster.head.descendants() if "scheduler" in Path(f"/proc/{pid}/cmdline").read_text()
        )
        os.kill(victim, signal.SIGKILL)
        assert cluster.head.process.wait(10) == 1
        assert "was killed by SIGKILL" in cluster.head.output


@pytest.mark.parametrize("present", [0, 1])
def test_a_node_that_never_comes_is_named(model, tmp_path: Path, present: int) -> None:
    folder, _ = model
    case = Case(nnodes=2, tp_size=2)
    with Network(2) as network:
        cluster = Cluster.__new__(Cluster)
        cluster.nodes = []
        flags = ["--model-path", str(folder), *case.flags(), "--node-rank", str(present), "--dist-timeout", "4"]
        flags += ["--dist-init-addr", f"{network.hosts[0].address}:5077"]
        with cluster:
            cluster.start_node(network.hosts[present], tmp_path / "log", flags)
            assert cluster.head.process.wait(60) == 1
            assert f"node {1 - present}" in cluster.head.output.splitlines()[-1]
            whom = "rank 1 of node 1" if present == 0 else "node 0 at"
            assert f"waiting up to 4 s (--dist-timeout) for {whom}" in cluster.head.output


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tp-size", "3", "--dp-size", "2", "--enable-dp-attention"], "--enable-dp-attention needs"),
        (["--tp-size", "3"], "--tp-size 3 does not divide the model's 4 attention heads"),
        (["--pp-size", "3"], "--pp-size 3 does not divide the model's 4 layers"),
        (["--tp-size", "4", "--ep-size", "4"], "--ep-size 4 does not divide the model's 6 experts"),
        (["--tp-size", "3", "--nnodes", "2", "--dist-init-addr", "127.0.0.1:5"], "can't be spread evenly"),
        (["--nnodes", "2", "--tp-size", "2"], "--dist-init-addr"),
    ],
)
def test_sizes_that_do_not_divide_are_said_before_anything_starts(model, tmp_path: Path, flags, words) -> None:
    folder, _ = model
    cluster = Cluster.__new__(Cluster)
    cluster.nodes = []
    with Network(1) as network, cluster:
        cluster.start_node(network.hosts[0], tmp_path / "log", ["--model-path", str(folder), *flags])
        assert cluster.head.process.wait(30) == 1
        assert words in cluster.head.output.splitlines()[-1]
