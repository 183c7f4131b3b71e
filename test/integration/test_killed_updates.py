"""SIGKILL while weights change, at random moments: afterwards they are the old or the new ones, never a mixture.

RAMET_KILLS=20 kills at 20 moments.
"""

import os
import random
import signal
import threading
import time

import httpx
import pytest
from seed_server import SeedServerProcess
from server_process import ServerProcess, assert_nothing_left
from updated_servers import SEED, SMALL, Case, Load, checksums, post, ranks_of, tokens, update, versions

NUM_KILLS = int(os.environ.get("RAMET_KILLS", "2"))


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return Case(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("seed", range(NUM_KILLS))
def test_a_rank_that_is_killed_ends_the_instance_and_not_one_answer_is_mixed(case, tmp_path, seed):
    random_ = random.Random(seed)
    with ServerProcess(case.models["old"], tmp_path / "log", "--tp-size", "2", *SMALL, fake=False) as server:
        url, children = server.wait_ready().url, server.children()
        load = Load(server, list(case.tokens.values()), num_switches=1000)
        victim = random_.choice(ranks_of(server))

        def kill():
            time.sleep(random_.uniform(0.0, 1.0))
            os.kill(victim, signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        num_switches = 0
        try:
            while post(server, "/update_weights_from_disk", model_path=str(case.models["new"])).status_code == 200:
                num_switches += 1
                if post(server, "/rollback_weights").status_code != 200:
                    break
                num_switches += 1
        except httpx.TransportError:
            pass
        assert server.wait_exit(30) != 0
        killer.join()
        load.num_switches = num_switches + 1
        load.end()
    assert_nothing_left(server, children)
    assert url in server.output and "was killed by SIGKILL" in server.output


def test_a_source_that_is_killed_leaves_one_version_whole(case, tmp_path):
    """And the next update works."""
    flags = ("--served-model-name", "random", "--remote-instance-weight-loader-timeout", "3", *SMALL)
    with ServerProcess(case.models["old"], tmp_path / "log", "--tp-size", "2", SEED, *flags, fake=False) as server:
        server.wait_ready()
        known = {"old": checksums(server)}
        update(server, case.models["new"])
        known["new"] = checksums(server)
        post(server, "/rollback_weights")
        outcomes = set()
        for number, moment_s in enumerate((0.05, 10.0)):
            with SeedServerProcess(case.models["new"], {"tp_size": 1}) as source:
                answers = []
                body = {"address": f"127.0.0.1:{source.port}", "weight_version": f"{number}"}
                asking = threading.Thread(
                    target=lambda body=body, answers=answers: answers.append(
                        post(server, "/update_weights_from_instance", **body)
                    )
                )
                asking.start()
                asking.join(moment_s)
                source.kill()
                asking.join()
            has_changed = answers[0].status_code == 200
            outcomes.add(has_changed)
            assert has_changed or answers[0].json()["success"] is False
            name = "new" if has_changed else "old"
            assert checksums(server) == known[name] and tokens(server) == case.tokens[name]
            assert (versions(server)[0][0] == f"{number}") == has_changed
            if has_changed:
                assert post(server, "/rollback_weights").json()["success"]
        assert outcomes == {True, False}
