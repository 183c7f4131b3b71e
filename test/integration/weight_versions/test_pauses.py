"""Pauses of real servers by SGLang's and vLLM's routes: of two replicas, and of a pipeline."""

import json
import threading

import httpx
import pytest
import random_models as rm
from server_process import Background, ServerProcess, wait_until

ADMIN = {"Authorization": "Bearer admin"}
PROMPTS = rm.random_prompts([9, 12, 7, 10])
PAUSED = {"message": "Generation paused successfully.", "status": "ok"}
CONTINUED = {"message": "Generation continued successfully.", "status": "ok"}
NUM_TOKENS = 400
LONG = {"temperature": 0, "max_new_tokens": NUM_TOKENS, "ignore_eos": True}


@pytest.fixture(scope="module")
def expected(server):
    """What the prompts give without a pause."""
    body = {"input_ids": PROMPTS, "sampling_params": LONG}
    return [one["output_ids"] for one in httpx.post(f"{server.url}/generate", json=body, timeout=60).json()]


@pytest.fixture(autouse=True)
def nothing_paused(server):
    yield
    assert httpx.post(f"{server.url}/resume", headers=ADMIN).status_code == 200


def admin(server, path, body=None, **query):
    return httpx.post(f"{server.url}{path}", json=body, params=query, headers=ADMIN, timeout=60)


def get(server, path):
    return httpx.get(f"{server.url}{path}", headers=ADMIN)


def begin(server, prompts=PROMPTS):
    """Streams that have begun, on both replicas."""
    streams = [Background(server.url, input_ids=prompt, sampling_params=LONG) for prompt in prompts]
    for stream in streams:
        assert stream.begun.wait(30)
    return streams


def outputs(streams):
    """The last event of each, once they have ended."""
    lines = [stream.join() for stream in streams]
    assert all(one[-1] == "[DONE]" for one in lines)
    return [json.loads(one[-2]) for one in lines]


def loads(server):
    return [(one["num_running_reqs"], one["num_waiting_reqs"]) for one in get(server, "/v1/loads").json()["loads"]]


def check_paused(server, *, ready_text):
    assert get(server, "/is_paused").json() == {"is_paused": True}
    ready = httpx.get(f"{server.url}/ready")
    assert ready.status_code == 503 and ready_text in ready.json()["error"]["message"]
    for path in ("/health", "/health_generate", "/ping"):
        answer = httpx.get(f"{server.url}{path}")
        assert answer.status_code == 200 and answer.json() == {"status": "paused"}


def check_running(server):
    assert get(server, "/is_paused").json() == {"is_paused": False}
    for path in ("/ready", "/health", "/health_generate"):
        assert httpx.get(f"{server.url}{path}").json() == {"status": "ready"}


@pytest.mark.parametrize(("mode", "held"), [("in_place", [(2, 0)] * 2), ("retract", [(0, 2)] * 2)])
def test_sglangs_pause_holds_requests_on_all_replicas(server, expected, mode, held):
    streams = begin(server)
    answer = admin(server, "/pause_generation", {"mode": mode})
    assert answer.status_code == 200 and answer.json() == PAUSED
    check_paused(server, ready_text="paused")
    assert loads(server) == held
    results = []
    body = {"input_ids": PROMPTS[0], "sampling_params": LONG}
    later = threading.Thread(target=lambda: results.append(admin(server, "/generate", body)))
    later.start()
    wait_until(lambda: sum(map(sum, loads(server))) == 5, "the request that comes in the pause")
    assert all(stream.thread.is_alive() for stream in streams) and not results
    assert admin(server, "/flush_cache").status_code == (400 if mode == "in_place" else 200)
    assert admin(server, "/continue_generation", {"torch_empty_cache": True}).json() == CONTINUED
    later.join(60)
    assert results[0].json()["output_ids"] == expected[0]
    ended = outputs(streams)
    assert [one["output_ids"] for one in ended] == expected
    assert ended[0]["meta_info"]["weight_versions"] == [{"version": "v1", "start": 0, "end": NUM_TOKENS}]
    check_running(server)


def test_sglangs_pause_aborts_by_default(server, expected):
    streams = begin(server)
    assert admin(server, "/pause_generation", {}).json() == PAUSED
    assert {one["meta_info"]["finish_reason"]["type"] for one in outputs(streams)} == {"abort"}
    assert loads(server) == [(0, 0)] * 2
    stream = Background(server.url, input_ids=PROMPTS[1], sampling_params=LONG)
    wait_until(lambda: sum(map(sum, loads(server))) == 1, "the request that comes in the pause")
    assert not stream.begun.is_set()
    assert admin(server, "/continue_generation").json() == CONTINUED
    assert outputs([stream])[0]["output_ids"] == expected[1]


def test_a_held_request_can_be_ended(server):
    streams = begin(server, PROMPTS[:2])
    rids = [json.loads(stream.lines[0])["meta_info"]["id"] for stream in streams]
    assert admin(server, "/pause_generation", {"mode": "in_place"}).status_code == 200
    assert admin(server, "/abort_request", {"rid": rids[0]}).status_code == 200
    assert outputs(streams[:1])[0]["meta_info"]["finish_reason"]["type"] == "abort"
    assert sum(map(sum, loads(server))) == 1
    assert admin(server, "/pause_generation", {"mode": "abort"}).json() == PAUSED  # a pause in a pause
    assert outputs(streams[1:])[0]["meta_info"]["finish_reason"]["type"] == "abort"


def refused(server):
    for path, body in (
        ("/generate", {"text": "a"}),
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "stream": True}),
    ):
        answer = httpx.post(f"{server.url}{path}", json=body, timeout=60)
        assert answer.status_code == 503 and "paused" in answer.json()["error"]["message"]


def test_vllms_abort_refuses_what_comes(server):
    streams = begin(server)
    assert admin(server, "/pause").json() == {"status": "paused"}
    assert {one["meta_info"]["finish_reason"]["type"] for one in outputs(streams)} == {"abort"}
    check_paused(server, ready_text="refused")
    refused(server)
    assert admin(server, "/resume").json() == {"status": "resumed"}
    check_running(server)


def test_vllms_wait_lets_requests_end_and_refuses_what_comes(server, expected):
    streams = begin(server)
    waiting = threading.Thread(target=lambda: answers.append(admin(server, "/pause", mode="wait")))
    answers = []
    waiting.start()
    wait_until(lambda: httpx.get(f"{server.url}/ready").status_code == 503, "the refusal")
    refused(server)
    waiting.join(60)
    assert answers[0].json() == {"status": "paused"}
    assert [one["output_ids"] for one in outputs(streams)] == expected
    check_paused(server, ready_text="refused")


def test_vllms_wait_ends_when_somebody_resumes(server):
    streams = begin(server)
    waiting = threading.Thread(target=lambda: answers.append(admin(server, "/pause", mode="wait")))
    answers = []
    waiting.start()
    wait_until(lambda: httpx.get(f"{server.url}/ready").status_code == 503, "the refusal")
    assert admin(server, "/resume").json() == {"status": "resumed"}
    waiting.join(60)
    assert answers[0].status_code == 400 and "before all requests had ended" in answers[0].json()["error"]["message"]
    check_running(server)
    outputs(streams)


def test_vllms_keep_holds_everything(server, expected):
    streams = begin(server)
    assert admin(server, "/pause", mode="keep").json() == {"status": "paused"}
    check_paused(server, ready_text="paused")
    never = admin(server, "/pause", mode="wait")
    assert never.status_code == 400 and "held by a pause" in never.json()["error"]["message"]
    later = Background(server.url, input_ids=PROMPTS[3], sampling_params=LONG)
    wait_until(lambda: sum(map(sum, loads(server))) == 5, "the request that comes in the pause")
    assert admin(server, "/resume").json() == {"status": "resumed"}
    assert [one["output_ids"] for one in outputs([*streams, later])] == [*expected, expected[3]]


def test_pauses_are_the_administrators(server):
    for path in ("/pause_generation", "/continue_generation", "/pause", "/resume"):
        assert httpx.post(f"{server.url}{path}").status_code == 401
    assert httpx.get(f"{server.url}/is_paused").status_code == 401
    assert admin(server, "/pause_generation", {"mode": "sleep"}).status_code == 400
    assert admin(server, "/pause", mode="sleep").status_code == 400
    older = admin(server, "/pause", wait_for_inflight_requests=True)
    assert older.status_code == 400 and older.json()["error"]["param"] == "wait_for_inflight_requests"
    check_running(server)


def test_a_paused_server_ends_well_and_answers_what_it_holds(model, tmp_path):
    flags = ("--pp-size", "2", "--max-total-tokens", "2048", "--max-running-requests", "4", "--watchdog-timeout", "3")
    with ServerProcess(model, tmp_path / "log", *flags, fake=False) as process:
        process.wait_ready()
        streams = begin(process, PROMPTS[:1])
        assert admin(process, "/pause_generation", {"mode": "in_place"}).status_code == 200
        paused = threading.Event()
        assert not paused.wait(3.5)  # longer than a hang may take, or than /health overlooks one
        assert httpx.get(f"{process.url}/health").json() == {"status": "paused"}
        process.signal()
        assert process.wait_exit() == 0
        assert len(outputs(streams)[0]["output_ids"]) == NUM_TOKENS
