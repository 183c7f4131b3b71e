"""Servers that sleep and wake: what requests, clones and updates meet meanwhile, and what faults leave.

RAMET_KILLS=20 kills at 20 moments.
"""

import base64
import os
import random
import signal
import threading
import time

import cluster
import httpx
import pytest
import torch
from pickled_tensors import forked
from ramet.srt.model_loader.remote_instance_weight_loader_utils import SeedRefused, SeedServer, fetch_seed_answer
from ramet.srt.utils.net import SeedAddress
from safetensors.torch import load_file
from seed_server import SeedServerProcess
from server_process import Background, ServerProcess, assert_nothing_left
from updated_servers import (
    GREEDY,
    NUM_TOKENS,
    PROMPT,
    SEED,
    SMALL,
    Case,
    checksums,
    post,
    ranks_of,
    tokens,
    update,
    versions,
)

SAVER = "--enable-memory-saver"
NAME = ("--served-model-name", "random")  # as seeds of tests call it
LONG = {**GREEDY, "max_new_tokens": 400}
NUM_KILLS = int(os.environ.get("RAMET_KILLS", "2"))


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return Case(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def server(case, tmp_path_factory):
    """Two ranks, whose weights others can take."""
    log = tmp_path_factory.mktemp("server") / "log"
    with ServerProcess(case.models["old"], log, "--tp-size", "2", SEED, SAVER, *NAME, *SMALL, fake=False) as process:
        yield process.wait_ready()
        assert "Traceback" not in process.output


def get(server, path):
    return httpx.get(f"{server.url}{path}")


def fall_asleep(server, **body):
    answer = post(server, "/release_memory_occupation", **body)
    assert (answer.status_code, answer.json()) == (200, None), answer.text


def wake(server, **body):
    answer = post(server, "/resume_memory_occupation", **body)
    assert (answer.status_code, answer.json()) == (200, None), answer.text


def test_requests_wait_for_it_to_wake_and_others_go_elsewhere(case, server):
    before, long = checksums(server), post(server, "/generate", input_ids=PROMPT, sampling_params=LONG).json()
    stream = Background(server.url, input_ids=PROMPT, sampling_params=LONG)
    stream.begun.wait(30)
    fall_asleep(server)
    assert get(server, "/is_sleeping").json() == {"is_sleeping": True, "tags": ["weights", "kv_cache"]}
    assert get(server, "/ready").status_code == 503 and "asleep" in get(server, "/ready").text
    for path in ("/health", "/health_generate", "/ping"):
        assert get(server, path).json() == {"status": "asleep"}
    late = Background(server.url, input_ids=PROMPT, sampling_params=GREEDY)
    answer = get(server, "/remote_instance_transfer_engine_info?rank=0")
    assert answer.status_code == 409 and "asleep" in answer.text
    seed, begun = SeedServer(SeedAddress("127.0.0.1", int(server.url.rpartition(":")[2]))), time.monotonic()
    with pytest.raises(SeedRefused, match="asleep"):
        fetch_seed_answer(seed, 0, "target", timeout_s=60)
    assert time.monotonic() - begun < 30, "a clone does not wait for an instance that sleeps"
    for path in ("/continue_generation", "/resume"):
        answer = post(server, path)
        assert answer.status_code == 400 and "wake it first" in answer.text
    answer = post(server, "/update_weight_version", new_version="x")
    assert answer.status_code == 400 and "asleep" in answer.text
    assert len(stream.lines) < 401 and not late.begun.is_set()
    wake(server)
    assert get(server, "/is_sleeping").json() == {"is_sleeping": False, "tags": []}
    assert get(server, "/ready").status_code == 200 and get(server, "/is_paused").json() == {"is_paused": False}
    assert f'"output_ids":{long["output_ids"]}'.replace(" ", "") in stream.join()[-2]
    late.join()
    assert checksums(server) == before and tokens(server) == case.tokens["old"]


def test_vllms_routes_refuse_requests_and_wake_in_parts(case, server):
    """From host memory, and an update of weights that are away needs no others."""
    stream = Background(server.url, input_ids=PROMPT, sampling_params=LONG)
    stream.begun.wait(30)
    answer = httpx.post(f"{server.url}/sleep").json()
    assert (answer["status"], answer["level"]) == ("sleeping", 1) and answer["num_bytes"] > 0
    assert '"type":"abort"' in stream.join()[-2]
    answer = post(server, "/generate", input_ids=PROMPT, sampling_params=GREEDY)
    assert answer.status_code == 503 and "asleep" in answer.text
    answer = httpx.post(f"{server.url}/wake_up?tags=weights&tags=scheduling").json()
    assert answer["status"] == "sleeping" and answer["missing"] == ["kv_cache"]
    assert answer["source"] == "host_memory"
    answer = httpx.post(f"{server.url}/wake_up").json()
    assert answer["status"] == "awake" and answer["tags"] is None and not answer["missing"]
    assert tokens(server) == case.tokens["old"]

    assert httpx.post(f"{server.url}/sleep?level=2&mode=wait").json()["status"] == "sleeping"
    answer = update(server, case.models["new"], weight_version="new")
    assert versions(server) == [("new", True)] and get(server, "/is_sleeping").json()["tags"] == ["kv_cache"]
    assert get(server, "/remote_instance_transfer_engine_info?rank=0").status_code == 409
    assert httpx.post(f"{server.url}/wake_up").json()["status"] == "awake"
    assert tokens(server) == case.tokens["new"]
    update(server, case.models["old"], weight_version="default")
    fall_asleep(server)
    assert versions(server) == [("default", True)], "the way back needs memory, too"
    wake(server)
    assert tokens(server) == case.tokens["old"]

    assert httpx.post(f"{server.url}/sleep?level=0&mode=keep").json()["num_bytes"] == 0
    assert get(server, "/is_sleeping").json() == {"is_sleeping": True, "tags": []}
    assert httpx.post(f"{server.url}/wake_up?tags=scheduling").json()["status"] == "awake"
    for query, words in (("level=3", "level"), ("mode=retract", "mode"), ("tags=weights", "tags is unknown")):
        answer = httpx.post(f"{server.url}/sleep?{query}")
        assert answer.status_code == 400 and words in answer.text
    answer = post(server, "/release_memory_occupation", tags=["weight"])
    assert answer.status_code == 400 and "kv_cache" in answer.text
    assert not get(server, "/is_sleeping").json()["is_sleeping"]


def test_tensors_that_fail_half_way_leave_it_asleep_and_all_of_them_heal_it(case, server, monkeypatch):
    """In the place of weights that are away there is nothing to go back to: none is served of half of them."""
    monkeypatch.setattr(torch.multiprocessing, "get_sharing_strategy", lambda: "file_system")
    tensors = list(load_file(case.models["new"] / "model.safetensors").items())

    def send(part, **body):
        payload = [base64.b64encode(forked(part)).decode()]
        return post(server, "/update_weights_from_tensor", serialized_named_tensors=payload, **body)

    def check_asleep():
        assert get(server, "/ready").status_code == 503 and get(server, "/health").json() == {"status": "asleep"}
        assert post(server, "/generate", input_ids=PROMPT, sampling_params=GREEDY).status_code == 503
        assert get(server, "/remote_instance_transfer_engine_info?rank=0").status_code == 409

    answer = send(tensors, mode="in_place")
    assert answer.status_code == 400 and "mode" in answer.text and tokens(server) == case.tokens["old"]
    fall_asleep(server, mode="abort")
    for first in ([], tensors[:4]):
        assert post(server, "/begin_weight_update").json()["success"]
        if first:
            assert send(first).json()["success"]
        answer = send([("stranger", torch.zeros(3)), *tensors[4:]])
        assert answer.status_code == 400 and "stranger" in answer.text
        answer = post(server, "/end_weight_update")
        assert answer.status_code == 400 and "the session has failed" in answer.text
        check_asleep()
    answer = send(tensors[1:])
    assert answer.status_code == 200 and f"{tensors[0][0]} must come before they do" in answer.text
    answer = post(server, "/resume_memory_occupation")
    assert answer.status_code == 400 and "not all have come yet" in answer.text
    answer = post(server, "/end_weight_update")
    assert answer.status_code == 400 and f"nothing serves that could stay, and {tensors[0][0]} did not" in answer.text
    check_asleep()
    assert send(tensors[:1]).json()["success"]
    answer = send(tensors)
    assert answer.status_code == 400 and f"{tensors[0][0]} has come before" in answer.text
    check_asleep()
    for start in range(0, len(tensors), 5):  # one bucket after the other, as trainers have room for
        check_asleep()
        answer = send(tensors[start : start + 5], weight_version="all").json()
        assert answer["success"]
    assert answer["weight_version"] == "all" and answer["num_bytes"] == 2 * sum(one.nbytes for _, one in tensors)
    assert get(server, "/is_sleeping").json()["tags"] == ["kv_cache"] and get(server, "/ready").status_code == 503
    wake(server)
    assert tokens(server) == case.tokens["new"] and versions(server) == [("all", True)]

    update(server, case.models["old"], weight_version="files")  # which are there to be taken again
    fall_asleep(server, mode="abort")
    wake(server, tags=["weights"])
    assert get(server, "/is_sleeping").json()["tags"] == ["kv_cache"]
    assert send(tensors[:4]).status_code == 200 and versions(server) == [("files", True)]
    answer = post(server, "/resume_memory_occupation")  # half of a step would serve, on top of another one
    assert answer.status_code == 400 and "not all have come yet" in answer.text
    check_asleep()
    assert send(tensors[4:], weight_version="step").json()["weight_version"] == "step"
    wake(server)
    assert tokens(server) == case.tokens["new"] and versions(server)[0] == ("step", True)

    for step in range(2):  # as trainers of SGLang's users do it, in their order
        fall_asleep(server)
        wake(server, tags=["weights"])  # which nobody has but the trainer
        assert get(server, "/is_sleeping").json()["tags"] == ["weights", "kv_cache"]
        assert post(server, "/pause_generation").status_code == 200 and post(server, "/flush_cache").json()["success"]
        assert send(tensors, weight_version=f"step {step}").json()["success"]
        assert post(server, "/continue_generation").status_code == 200 and get(server, "/ready").status_code == 503
        wake(server, tags=["kv_cache"])
        wake(server, tags=["cuda_graph"])
        assert tokens(server) == case.tokens["new"] and versions(server) == [(f"step {step}", True)]
    fall_asleep(server)
    wake(server, tags=["weights"])
    answer = post(server, "/resume_memory_occupation", tags=["kv_cache"])
    assert answer.status_code == 400 and "nobody is known who has the weights" in answer.text
    update(server, case.models["old"], weight_version="default")
    wake(server)
    assert tokens(server) == case.tokens["old"]


def test_it_sleeps_on_while_its_weights_can_be_had_nowhere(case, server):
    file = case.models["old"] / "model.safetensors"
    fall_asleep(server)
    hidden = file.rename(file.with_suffix(".hidden"))
    for _ in range(2):
        answer = post(server, "/resume_memory_occupation")
        assert answer.status_code == 400 and "sleeps on: rank 0, 1:" in answer.text
        assert get(server, "/is_sleeping").json()["tags"] and get(server, "/ready").status_code == 503
    hidden.rename(file)
    with SeedServerProcess(case.models["old"], {}) as peer:
        file.rename(hidden)
        wake(server, address=f"127.0.0.1:{peer.port}")
    hidden.rename(file)
    assert tokens(server) == case.tokens["old"]


def test_an_instance_on_two_nodes_sleeps_and_wakes_as_one(case, tmp_path):
    """Each node gives its part back and takes it again, or none does; a node that is lost asleep ends the other."""
    sizes, file = cluster.Case(nnodes=2, tp_size=2), case.models["old"] / "model.safetensors"
    with (
        cluster.Network(2) as network,
        cluster.Cluster(sizes, network.hosts, case.models["old"], tmp_path, SEED, SAVER, *SMALL[:4]) as one,
    ):
        head = one.wait_ready().head

        def ask(path, status=200, **body):
            answer = head.request(path, body)
            assert answer[0] == status, answer
            return answer[1]

        def resident():
            """Bytes of weights and KV cache that each node's rank has in memory."""
            return [max(shared_nbytes(pid) for pid in node.descendants()) for node in one.nodes]

        before = resident()
        for tags in (None, ["weights"], ["kv_cache"]):
            ask("/release_memory_occupation", tags=tags)
            gone = tags or ["weights", "kv_cache"]
            assert head.request("/is_sleeping")[1] == {"is_sleeping": True, "tags": gone}
            assert head.request("/ready")[0] == 503 and head.request("/health")[1] == {"status": "asleep"}
            assert one.nodes[1].request("/health")[0] == 200
            if "weights" in gone:
                assert all(now < 0.7 * then for now, then in zip(resident(), before, strict=True)), (resident(), before)
            ask("/resume_memory_occupation", tags=tags)
            assert head.generate(PROMPT, NUM_TOKENS) == case.tokens["old"]
        ask("/release_memory_occupation")
        hidden = file.rename(file.with_suffix(".hidden"))
        message = ask("/resume_memory_occupation", status=400)["error"]["message"]
        hidden.rename(file)
        assert "sleeps on: rank 0, 1:" in message and head.request("/ready")[0] == 503
        ask("/update_weights_from_disk", model_path=str(case.models["new"]), weight_version="new")
        ask("/resume_memory_occupation")
        assert head.generate(PROMPT, NUM_TOKENS) == case.tokens["new"]
        cluster.check_registrations(head, sizes)
        ask("/release_memory_occupation")
        one.nodes[1].kill()
        assert head.process.wait(60) != 0 and "node 1" in head.output


def shared_nbytes(pid):
    """Of memory files, where weights are, and of shared memory."""
    with open(f"/proc/{pid}/status") as file:
        return next((int(line.split()[1]) * 1024 for line in file if line.startswith("RssShmem")), 0)


@pytest.mark.parametrize("seed", range(NUM_KILLS))
def test_a_rank_that_is_killed_asleep_or_waking_ends_the_instance(case, tmp_path, seed):
    random_ = random.Random(seed)
    with ServerProcess(case.models["old"], tmp_path / "log", "--tp-size", "2", SAVER, *SMALL, fake=False) as one:
        children = one.wait_ready().children()
        fall_asleep(one)
        victim, is_waking = random_.choice(ranks_of(one)), random_.random() < 0.6
        answers = []

        def ask():
            with pytest.raises(httpx.TransportError):
                while True:
                    answers.append(post(one, "/resume_memory_occupation").status_code)
                    answer = post(one, "/generate", input_ids=PROMPT, sampling_params=GREEDY)
                    if answer.status_code == 200:
                        answers.append(answer.json()["output_ids"])
                    answers.append(post(one, "/release_memory_occupation").status_code)

        asking = threading.Thread(target=ask)
        if is_waking:
            asking.start()
            time.sleep(random_.uniform(0.0, 0.3))
        os.kill(victim, signal.SIGKILL)
        assert one.wait_exit(30) != 0
        if is_waking:
            asking.join()
        assert [one for one in answers if one not in (200, 503, 400, case.tokens["old"])] == []
    assert_nothing_left(one, children)
    assert "was killed by SIGKILL" in one.output and "Traceback" not in one.output


def test_sigterm_ends_it_asleep_with_those_who_wait(server):
    """The last one of this server."""
    fall_asleep(server)
    late = Background(server.url, input_ids=PROMPT, sampling_params=GREEDY)
    while '"num_waiting_reqs":1' not in get(server, "/v1/loads").text.replace(" ", ""):
        time.sleep(0.01)
    server.signal()
    assert server.wait_exit(20) == 0
    assert '"type":"abort"' in late.join()[-2]
