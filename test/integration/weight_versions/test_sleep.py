"""Two replicas that sleep, as a metadata server and those without the admin key see them."""

import httpx
import pytest
import random_models as rm
from cluster import usual_or_all
from ramet.srt.modelexpress.client.client import ModelExpressClient
from ramet.srt.modelexpress.client.publisher import READY, STALE
from server_process import ServerProcess, wait_until

ADMIN = {"Authorization": "Bearer admin"}
PROMPT = rm.random_prompts([9])[0]
PATHS = ("/release_memory_occupation", "/resume_memory_occupation", "/sleep", "/wake_up")


def tokens(server):
    body = {"input_ids": [PROMPT] * 2, "sampling_params": {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}}
    answer = httpx.post(f"{server.url}/generate", json=body, timeout=60)
    return [one["output_ids"] for one in answer.json()] if answer.status_code == 200 else answer.status_code


def num_listed(mx, status):
    with ModelExpressClient(mx.address, environ={}) as client:
        return len(client.list_sources(status=status))


def test_all_replicas_sleep_and_nobody_is_sent_to_them(server, mx):
    wait_until(lambda: num_listed(mx, READY) == 2, "the records")
    before, num_stale = tokens(server), num_listed(mx, STALE)
    for path in PATHS:
        assert httpx.post(f"{server.url}{path}").status_code == 401
    assert httpx.post(f"{server.url}/sleep", params={"level": 2}, headers=ADMIN, timeout=60).status_code == 200
    assert num_listed(mx, READY) == 0 and num_listed(mx, STALE) == num_stale + 2
    assert tokens(server) == 503
    answer = httpx.post(f"{server.url}/wake_up", headers=ADMIN, timeout=60).json()
    assert answer["status"] == "awake" and answer["source"] == "checkpoint"
    assert tokens(server) == before
    wait_until(lambda: num_listed(mx, READY) == 2, "the records again")


@pytest.mark.slow
@pytest.mark.parametrize("sizes", usual_or_all(["--pp-size 2"], ["--tp-size 2 --dp-size 2"]))
def test_every_topology_sleeps(tmp_path, sizes):
    model = rm.make_model(tmp_path / "model", "llama3", num_hidden_layers=4)
    flags = (*sizes.split(), "--max-total-tokens", "2048", "--max-running-requests", "8", "--enable-memory-saver")
    with ServerProcess(model, tmp_path / "log", *flags, fake=False) as one:
        before = tokens(one.wait_ready())
        for level in (2, 1):
            assert httpx.post(f"{one.url}/sleep?level={level}", timeout=60).status_code == 200
            assert tokens(one) == 503
            assert httpx.post(f"{one.url}/wake_up", timeout=60).json()["status"] == "awake"
            assert tokens(one) == before
