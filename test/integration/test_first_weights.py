"""A server that starts without weights: nobody is answered before the first update, which must be whole."""

import httpx
import random_models as rm
from safetensors.torch import load_file, save_file
from server_process import ServerProcess, wait_until
from trainers import Trainer
from updated_servers import GREEDY, PROMPT, SEED, SMALL, Case, checksums, post, tokens, update, versions

FLAG = "--checkpoint-engine-wait-weights-before-ready"


def said(server):
    return httpx.get(f"{server.url}/ready").text


def test_nothing_is_served_before_the_first_weights(tmp_path):
    """By checkpoint-engine, to two ranks of a model without files; half of the weights is none."""
    case = Case(tmp_path / "models")
    bare = rm.without_weights(case.models["old"], tmp_path / "bare")
    whole = case.models["new"] / "model.safetensors"
    half = tmp_path / "half.safetensors"
    save_file({name: tensor for name, tensor in load_file(whole).items() if ".1." not in name}, half)
    sockets = {f"CPU-{rank}": f"ipc://{tmp_path}/{rank}" for rank in range(2)}
    flags = (FLAG, "--load-format", "dummy", "--tp-size", "2", SEED, *SMALL)
    with ServerProcess(bare, tmp_path / "log", *flags, fake=False) as server, Trainer() as trainer:
        wait_until(lambda: server.status(f"{server.url}/ready") == 503 and "no weights" in said(server), "the start")
        for path in ("/health", "/ping", "/health_generate"):
            assert httpx.get(f"{server.url}{path}").json() == {"status": "awaiting_weights"}
        assert versions(server) == []
        answer = post(server, "/generate", input_ids=PROMPT, sampling_params=GREEDY)
        assert answer.status_code == 503 and "no weights have come yet" in answer.text
        assert httpx.get(f"{server.url}/remote_instance_transfer_engine_info?rank=0").status_code == 503
        answer = post(server, "/rollback_weights")
        assert answer.status_code == 400 and "no version before this one" in answer.text
        trainer.lend(half, list(sockets.values()), 1 << 19)
        answer = post(server, "/update_weights_from_ipc", zmq_handles=sockets)
        assert answer.status_code == 400 and "nothing serves that could stay" in answer.text
        assert trainer.wait() == "done" and server.status(f"{server.url}/ready") == 503
        trainer.lend(whole, list(sockets.values()), 1 << 19)
        answer = post(server, "/update_weights_from_ipc", zmq_handles=sockets, weight_version="first")
        assert answer.status_code == 200, answer.text
        assert httpx.get(f"{server.url}/health").json() == {"status": "ready"}
        assert httpx.get(f"{server.url}/ready").status_code == 200 and tokens(server) == case.tokens["new"]
        assert versions(server) == [("first", True)]
        assert post(server, "/rollback_weights").status_code == 400
        first = checksums(server)
        update(server, case.models["old"])
        assert tokens(server) == case.tokens["old"] and post(server, "/rollback_weights").json()["success"]
        assert tokens(server) == case.tokens["new"] and checksums(server) == first
