"""A standby of two ranks that a metadata server knows: it becomes what is wanted, and none again."""

import httpx
import pytest
import random_models as rm
from modelexpress_harness import running_server
from ramet.srt.modelexpress.client.fleet_command import run_fleet_command
from server_process import assert_nothing_left, wait_until
from standby_process import StandbyProcess
from updated_servers import NUM_TOKENS, PROMPT, tokens

FEW = ("--max-total-tokens", "2048", "--max-running-requests", "8", "--tp-size", "2")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return rm.make_model(tmp_path_factory.mktemp("models") / "m", "llama3", seed=0)


def test_a_standby_becomes_what_is_wanted_until_a_signal_ends_all_of_it(model, tmp_path, capsys):
    with running_server() as server:
        config = f'{{"url": "{server.address}"}}'
        with StandbyProcess(tmp_path / "log", *FEW, "--modelexpress-config", config) as standby:
            standby.wait_warm()
            url = f"{server.http_url}/fleet/scale"

            def state():
                return httpx.get(url, timeout=10).json()

            wait_until(lambda: [one["is_warm"] for one in state()["standbys"]] == [True], "that the server knows it")
            command = ["scale", "grown", "1", "--model-path", str(model), "--url", server.address]
            become = '{"served_model_name": "grown", "source": "files"}'
            assert run_fleet_command([*command, "--become", become], "ramet fleet") == 0
            assert "grown: 0 of 1 serve, 1 become it" in capsys.readouterr().out
            wait_until(lambda: standby.state["state"] == "serving", "that it serves")
            assert tokens(standby) == rm.hf_greedy(model, [PROMPT], NUM_TOKENS)[0]
            wait_until(lambda: state()["models"][0]["serving"] == [standby.url], "that it counts")
            assert run_fleet_command(["status", "--url", server.address], "ramet fleet") == 0
            assert "grown: 1 of 1 serve" in capsys.readouterr().out
            answer = httpx.post(url, json={"model": "grown", "instances": 0}, timeout=10)
            assert answer.json()["wanted"] == 0, answer.text
            wait_until(lambda: standby.state["state"] == "standby", "that it is a standby again")
            assert httpx.post(url, json={"model": "grown", "instances": 1}, timeout=10).status_code == 200
            wait_until(lambda: standby.state["state"] == "serving", "that it serves again")
            assert tokens(standby) == rm.hf_greedy(model, [PROMPT], NUM_TOKENS)[0]
            assert httpx.post(url, json={"model": "grown"}, timeout=10).status_code == 400
            page = httpx.get(f"{server.http_url}/", timeout=10).text
            assert "fleet_pool.js" in page
            children = standby.wait_warm().children()
            standby.signal()
            assert standby.wait_exit() == 0
            assert_nothing_left(standby, children)
