"""A standby with real processes: what it becomes and answers, what it refuses, and what deaths leave of it."""

import json
import os
import re
import signal
import threading

import httpx
import pytest
import random_models as rm
from server_process import Background, ServerProcess, assert_nothing_left, is_running, wait_until
from standby_process import ParkProcess, StandbyProcess, newest
from updated_servers import GREEDY, NUM_TOKENS, PROMPT, SEED, SMALL, ranks_of, tokens

FEW = ("--max-total-tokens", "2048", "--max-running-requests", "8")
LONG = {**GREEDY, "max_new_tokens": 400}
DEEP = {"num_hidden_layers": 3}
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    made = {
        "a": rm.make_model(folder / "a", "llama3", seed=0),
        "b": rm.make_model(folder / "b", "qwen3", seed=1, **DEEP),
    }
    (folder / "broken").mkdir()
    broken = rm.make_model(folder / "broken", "llama3", seed=0, num_hidden_layers=1)
    (weights,) = broken.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    made["broken"] = broken
    return made


@pytest.fixture(scope="module")
def expected(models):
    return {name: rm.hf_greedy(models[name], [PROMPT], NUM_TOKENS)[0] for name in "ab"}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    log = tmp_path_factory.mktemp("standby") / "log"
    with StandbyProcess(log, *FEW, "--drain-timeout", "20") as process:
        yield process.wait_warm()
        assert "Traceback" not in process.output


@pytest.fixture
def standby(shared):
    """It has no model when a test begins."""
    shared.become(None)
    return shared


def get(server, path):
    return httpx.get(f"{server.url}{path}", timeout=10)


def memory_of(pids):
    """Bytes of these processes, what they share counted once."""
    total = 0
    for pid in pids:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            total += sum(1024 * int(one) for one in re.findall(r"^Pss:\s+(\d+)", file.read(), re.M))
    return total


def test_without_a_model_it_is_well_and_not_ready(standby):
    assert get(standby, "/health").json() == {"status": "standby"}
    assert get(standby, "/ready").status_code == 503
    for path in ("/server_info", "/get_server_info"):
        info = get(standby, path).json()
        assert (info["state"], info["model_path"], info["max_total_tokens"]) == ("standby", None, 2048)
    assert get(standby, "/v1/models").json()["data"] == []
    assert "ramet:standby 1.0" in get(standby, "/metrics").text
    refused = httpx.post(f"{standby.url}/generate", json={"input_ids": PROMPT, "sampling_params": GREEDY})
    assert refused.status_code == 503 and "standby" in refused.text


def test_it_becomes_one_model_after_the_other_and_none_again(standby, models, expected):
    outcome = standby.become(models["a"], served_model_name="first")
    assert (outcome["state"], outcome["served_model_name"], outcome["was"]) == ("serving", "first", None)
    assert outcome["source"] == "checkpoint" and outcome["num_bytes"] > 0 and outcome["weight_version"] == "default"
    assert outcome["milliseconds"] >= outcome["phases_ms"]["checked"] > 0
    assert tokens(standby) == expected["a"]
    assert get(standby, "/ready").status_code == 200
    assert [one["id"] for one in get(standby, "/v1/models").json()["data"]] == ["first"]
    assert get(standby, "/server_info").json()["state"] == "serving"
    assert standby.become(models["a"], served_model_name="first")["way"] == "same"
    outcome = standby.become(models["b"])
    assert (outcome["was"], outcome["way"]) == ("first", "new")
    assert tokens(standby) == expected["b"]
    metrics = get(standby, "/metrics").text
    assert 'ramet:become_seconds_count{way="new"}' in metrics and f'model_name="{models["b"]}"' in metrics
    assert standby.become(None)["state"] == "standby"
    assert get(standby, "/ready").status_code == 503 and get(standby, "/health").status_code == 200


def test_what_it_was_once_is_there_again_with_nothing_but_bytes(standby, models, expected):
    standby.become(models["a"])
    ranks = ranks_of(standby)
    standby.become(models["b"])
    outcome = standby.become(models["a"])
    assert (outcome["way"], outcome["source"]) == ("kept", "checkpoint")
    assert list(outcome["phases_ms"]) == ["checked", "put down", "weights", "ready"]
    assert set(ranks) & set(ranks_of(standby)), "the processes are others"
    assert tokens(standby) == expected["a"]


def test_other_files_in_the_same_place_are_what_it_serves_then(standby, models, expected, tmp_path):
    folder = rm.make_model(tmp_path / "changing", "llama3", seed=0)
    standby.become(folder)
    assert tokens(standby) == expected["a"]
    standby.become(None)
    rm.make_model(folder, "llama3", seed=5)
    outcome = standby.become(folder)
    assert outcome["way"] == "kept" and tokens(standby) == rm.hf_greedy(folder, [PROMPT], NUM_TOKENS)[0]


def test_ten_changes_give_the_same_tokens_and_take_no_memory(standby, models, expected):
    sizes = []
    for _ in range(5):
        for name in "ab":
            standby.become(models[name])
            assert tokens(standby) == expected[name]
        standby.wait_warm()
        sizes.append(memory_of([standby.process.pid, *ranks_of(standby)]))
    assert sizes[-1] - sizes[1] < 16e6, sizes
    assert len(ranks_of(standby)) <= 4  # what serves, two that are kept, and a spare


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"model_path": "/nowhere"}, "/nowhere"),
        ({"model_path": "a", "dtype": "int4"}, "--dtype"),
        ({"model_path": "a", "tp_size": 3}, "tp"),
        ({"model_path": "a", "source": "instance"}, "seed"),
        ({"model_path": "a", "source": "modelexpress"}, "metadata server"),
        ({"model_path": "a", "source": "files", "seed": "localhost:1"}, "contradict"),
        ({"model_path": "a", "source": "instance", "seed": "127.0.0.1:9"}, "127.0.0.1:9"),
        ({"model_path": "a", "weights_digest": "nonsense"}, "digest"),
        ({"model_path": "broken"}, "safetensors"),
        ({"model_path": None, "tp_size": 2}, "tp_size"),
        ({}, "model_path"),
        ({"model_path": "a", "colour": "red"}, "colour"),
    ],
)
def test_what_it_can_not_become_leaves_it_as_it_was(standby, models, expected, body, words):
    standby.become(models["b"])
    body = {**body, "model_path": models.get(body["model_path"], body["model_path"])} if "model_path" in body else {}
    text = json.dumps(body, default=str)
    answer = httpx.post(f"{standby.url}/become", content=text, headers=JSON, timeout=60)
    assert answer.status_code == 400 and words in answer.json()["error"]["message"], answer.text
    assert tokens(standby) == expected["b"]
    assert get(standby, "/ready").status_code == 200


def test_requests_end_first_or_are_ended(standby, models, expected):
    standby.become(models["a"])
    whole = httpx.post(f"{standby.url}/generate", json={"input_ids": PROMPT, "sampling_params": LONG}, timeout=60)
    stream = Background(standby.url, input_ids=PROMPT, sampling_params=LONG)
    stream.begun.wait(30)
    standby.become(models["b"])
    last = stream.join()[-2]
    assert whole.json()["output_ids"][-5:] and '"type":"length"' in last, last
    standby.become(models["a"])
    stream = Background(standby.url, input_ids=PROMPT, sampling_params=LONG)
    stream.begun.wait(30)
    standby.become(None, requests="abort")
    assert '"type":"abort"' in stream.join()[-2]


def test_one_change_at_a_time(standby, models):
    answers = []
    changes = [
        threading.Thread(target=lambda name=name: answers.append(standby.ask(models[name]).status_code))
        for name in "aabb"
    ]
    for change in changes:
        change.start()
    for change in changes:
        change.join()
    assert 200 in answers and set(answers) <= {200, 409}


def test_a_spare_that_is_killed_is_replaced(standby, models, expected):
    standby.wait_warm()
    spare = newest(ranks_of(standby))
    os.kill(spare, signal.SIGKILL)
    wait_until(lambda: not is_running(spare) and not standby.state["is_warm"], "that it is missed")
    assert get(standby, "/health").status_code == 200
    standby.become(models["b"])
    assert tokens(standby) == expected["b"]


def test_a_rank_that_is_killed_while_it_becomes_a_model_leaves_what_served(standby, models, expected):
    standby.become(models["b"])
    standby.wait_warm()
    spare = newest(ranks_of(standby))
    os.kill(spare, signal.SIGSTOP)
    answers = []
    change = threading.Thread(target=lambda: answers.append(standby.ask(models["a"], context_length=64)))
    change.start()
    wait_until(lambda: standby.state["state"] == "becoming", "that it changes")
    assert get(standby, "/health").json() == {"status": "becoming"}
    os.kill(spare, signal.SIGKILL)
    change.join(60)
    assert answers[0].status_code == 400 and "SIGKILL" in answers[0].text, answers[0].text
    assert tokens(standby) == expected["b"]


@pytest.mark.skipif("RAMET_KILLS" not in os.environ, reason="takes long; RAMET_KILLS is not set")
def test_a_rank_or_a_seed_that_is_killed_while_it_becomes_a_model_leaves_what_served(tmp_path, models, expected):
    """And one that is killed while its model serves ends the instance, as always."""
    with (
        ServerProcess(models["a"], tmp_path / "seed", SEED, *SMALL, fake=False) as seed,
        StandbyProcess(tmp_path / "log", *FEW) as standby,
    ):
        seed.wait_ready()
        address = seed.url.removeprefix("http://")
        standby.wait_warm().become(models["b"])
        serving = set(ranks_of(standby.wait_warm()))
        spare = newest(serving)
        os.kill(spare, signal.SIGSTOP)
        answers = []

        def become_a():
            answers.append(standby.ask(models["a"], source="instance", seed=address))

        change = threading.Thread(target=become_a)
        change.start()
        wait_until(lambda: standby.state["state"] == "becoming", "that it changes")
        assert get(standby, "/health").json() == {"status": "becoming"}
        refused = httpx.post(f"{standby.url}/generate", json={"input_ids": PROMPT, "sampling_params": GREEDY})
        assert refused.status_code == 503 and "becomes" in refused.text
        os.kill(spare, signal.SIGKILL)
        change.join(60)
        assert answers[0].status_code == 400 and "SIGKILL" in answers[0].text, answers[0].text
        assert tokens(standby) == expected["b"]
        outcome = standby.become(models["a"], source="instance", seed=address)
        assert outcome["source"].startswith("local") and tokens(standby) == expected["a"]
        standby.become(models["b"])
        seed.signal(signal.SIGSTOP)
        change = threading.Thread(target=become_a)
        change.start()
        wait_until(lambda: standby.state["state"] == "becoming", "that it changes")
        seed.kill()
        change.join(60)
        assert answers[1].status_code == 400 and address in answers[1].text, answers[1].text
        assert tokens(standby) == expected["b"]
        outcome = standby.become(models["a"], seed=address)
        assert outcome["source"] == "checkpoint" and tokens(standby) == expected["a"]
        standby.wait_warm()
        wait_until(lambda: len(ranks_of(standby)) == 3, "the end of what could not be woken")
        (rank,) = set(ranks_of(standby)) - (serving - {spare}) - {newest(ranks_of(standby))}
        children = standby.children()
        os.kill(rank, signal.SIGKILL)
        assert standby.wait_exit() == 1
        assert "SIGKILL" in standby.output.splitlines()[-1]
        assert_nothing_left(standby, children)


def test_serve_takes_a_standby_of_its_host(standby, models, expected, tmp_path):
    log = tmp_path / "log"
    with ServerProcess(models["a"], log, "--from-standby", fake=False, TMPDIR=str(standby.temporary)) as server:
        server.wait_ready()
        assert tokens(server) == expected["a"] and "by the standby" in server.output
        assert standby.state["served_model_name"] == "fake"
        standby.become(None)
        assert server.wait_exit() == 1 and "no more" in server.output.splitlines()[-1]


def test_a_parked_port_wakes_it_at_the_first_request(standby, models, expected, tmp_path):
    with ParkProcess(models["a"], tmp_path / "log", "--standby", standby.url, "--idle-timeout", "1") as park:
        assert get(park, "/health").json() == {"status": "parked"} and standby.state["state"] == "standby"
        assert tokens(park) == expected["a"] and standby.state["state"] == "serving"
        wait_until(lambda: standby.state["state"] == "standby", "that it is parked again")
        assert tokens(park) == expected["a"]
        assert standby.ask(models["b"], from_standby=True).status_code == 409
        with httpx.Client(base_url=park.url, timeout=30) as client:
            body = {"input_ids": PROMPT, "sampling_params": GREEDY}
            assert client.post("/generate", json=body).json()["output_ids"] == expected["a"]
            standby.become(models["b"])  # an operator may
            refused = client.post("/generate", json=body)
            assert refused.status_code == 503, "on the same connection another model has answered"
        refused = httpx.post(f"{park.url}/generate", json={"input_ids": PROMPT, "sampling_params": GREEDY}, timeout=30)
        assert refused.status_code == 503 and "no standby" in refused.text, refused.text
        assert tokens(standby) == expected["b"], "nobody's model is taken away"
        park.signal(signal.SIGTERM)
        assert park.wait_exit() == 0
    assert tokens(standby) == expected["b"]
