"""Trainers that broadcast weights to a server of two ranks: SGLang's way and vLLM's, and trainers that fail."""

import threading

import httpx
import pytest
from ramet.srt.utils.net import listen_on
from ramet.srt.utils.threads import run_beside
from server_process import ServerProcess
from trainers import Trainer, describe
from updated_servers import SMALL, Case, Load, post, tokens, versions


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return Case(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def server(case, tmp_path_factory):
    """Two ranks, with the old weights."""
    log = tmp_path_factory.mktemp("server") / "log"
    with ServerProcess(case.models["old"], log, "--tp-size", "2", *SMALL, fake=False) as server:
        yield server.wait_ready()


@pytest.fixture
def trainer():
    with Trainer() as trainer:
        yield trainer


def weights(case, name="new"):
    return case.models[name] / "model.safetensors"


def init(server, trainer, name="weight_update_group", **body):
    """As SGLang's trainers ask for it: with the ranks behind their own."""
    place = {"master_address": "127.0.0.1", "master_port": trainer.port, "rank_offset": 1, "world_size": 3}
    return post(server, "/init_weights_update_group", **place | {"group_name": name, "backend": "gloo"} | body)


def join(server, trainer):
    trainer.join(3)
    answer = init(server, trainer)
    assert answer.status_code == 200 and answer.json()["success"], answer.text
    assert trainer.wait() == "done"


def from_distributed(server, path, names=None, **body):
    names, dtypes, shapes = describe(path, names)
    said = {"names": names, "dtypes": dtypes, "shapes": shapes, "group_name": "weight_update_group"}
    said |= {"flush_cache": True, "load_format": None, "selector": "all", "torch_empty_cache": False}
    return post(server, "/update_weights_from_distributed", **said | body)


def back(server, case):
    assert post(server, "/rollback_weights").json()["success"] and tokens(server) == case.tokens["old"]


def test_weights_come_by_broadcast_under_load_and_groups_are_made_again(case, server, trainer):
    """With a session and without, one by one and in a bucket; the trainer's death is an answer."""
    path = weights(case)
    join(server, trainer)
    load = Load(server, list(case.tokens.values()))
    try:
        trainer.send(path)
        answer = from_distributed(server, path, weight_version="step 1").json()
    finally:
        load.end()
    assert answer["success"] and answer["source"] == "broadcast" and answer["weight_version"] == "step 1", answer
    assert tokens(server) == case.tokens["new"] and versions(server)[0] == ("step 1", True)
    back(server, case)

    names = describe(path)[0]
    assert post(server, "/begin_weight_update").json()["success"]
    for part in (names[:5], names[5:]):
        trainer.send(path, part, flat=1 << 40)
        answer = from_distributed(server, path, part, load_format="flattened_bucket").json()
        assert answer["success"] and "/end_weight_update" in answer["message"]
        assert tokens(server) == case.tokens["old"]
    assert post(server, "/end_weight_update", weight_version="step 2").json()["weight_version"] == "step 2"
    assert tokens(server) == case.tokens["new"]
    back(server, case)

    assert post(server, "/begin_weight_update").json()["success"]
    trainer.send(path, names[:5])
    assert from_distributed(server, path, names[:5]).json()["success"]
    threading.Timer(0.3, trainer.process.kill).start()
    answer = from_distributed(server, path, names[5:])
    assert answer.status_code == 400 and "did not come, and the group 'weight_update_group' is left" in answer.text
    assert "closed by peer" in answer.text and tokens(server) == case.tokens["old"]
    answer = post(server, "/end_weight_update")
    assert answer.status_code == 400 and "the session has failed" in answer.text
    answer = from_distributed(server, path)
    assert answer.status_code == 400 and "there is no group 'weight_update_group'" in answer.text
    assert post(server, "/destroy_weights_update_group").json()["success"]
    assert "there is no group" in post(server, "/destroy_weights_update_group").json()["message"]


def test_what_is_not_what_was_announced_is_refused(case, server, trainer):
    """A name that the model does not have costs the update, other sizes the group too; neither what serves."""
    path = weights(case)
    names, dtypes, shapes = describe(path)
    join(server, trainer)
    trainer.send(path)
    wrong = {"names": ["stranger", *names[1:]], "dtypes": dtypes, "shapes": shapes}
    answer = post(server, "/update_weights_from_distributed", **wrong)
    assert answer.status_code == 400 and "no tensor stranger" in answer.text
    assert trainer.wait() == "done"  # the rest was received
    trainer.send(path, more=-8)
    answer = from_distributed(server, path)
    assert answer.status_code == 400 and "fewer bytes than were announced" in answer.text
    assert tokens(server) == case.tokens["old"]
    trainer.wait()
    join(server, trainer)
    trainer.send(path, names[:3])
    answer = from_distributed(server, path, timeout_s=1.0)  # sends fewer than it said
    assert answer.status_code == 400 and "did not come" in answer.text and tokens(server) == case.tokens["old"]
    trainer.wait()
    join(server, trainer)
    trainer.send(path)
    answer = post(server, "/update_weights_from_distributed", names=names, dtypes=dtypes[1:], shapes=shapes)
    assert answer.status_code == 400 and "do not belong together" in answer.text
    answer = from_distributed(server, path)  # what has been sent was not for this one
    assert answer.status_code == 400 and "has not been received" in answer.text
    assert tokens(server) == case.tokens["old"]
    trainer.wait()
    join(server, trainer)
    trainer.send(path)
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{server.url}/update_weights_from_distributed", content=b"{", headers=headers)
    assert answer.status_code == 400
    answer = from_distributed(server, path)
    assert answer.status_code == 400 and "has not been received" in answer.text
    assert tokens(server) == case.tokens["old"]
    answer = post(server, "/update_weights_from_distributed", names=["a"], dtypes=["complex64"], shapes=[[1]])
    assert answer.status_code == 400 and "unknown dtype" in answer.text


def test_a_trainer_that_never_comes_is_waited_for_only_as_long_as_was_said(case, server, trainer):
    trainer.port = 1
    answer = init(server, trainer, timeout_s=0.5)
    assert answer.status_code == 400 and "no trainer has listened at 127.0.0.1:1" in answer.text
    answer = init(server, trainer, world_size=2)
    assert answer.status_code == 400 and "has no places for them" in answer.text
    answer = init(server, trainer, backend="nccl")
    assert answer.status_code == 400 and "not on a GPU" in answer.text
    waiting = run_beside(lambda: init(server, trainer), "init")
    while post(server, "/destroy_weights_update_group").status_code != 200:
        pass
    answer = waiting.result()
    assert answer.status_code == 400 and "was left meanwhile" in answer.text
    assert tokens(server) == case.tokens["old"]


def vllm(server, path, **body):
    answer = post(server, path, **body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_trainer_that_starts_again_takes_the_place_of_itself(case, server, trainer):
    """While its first request still waits; and what is waited for in a group ends with the group."""
    path = weights(case)
    names, dtypes, shapes = describe(path)
    info = {"update_info": {"names": names, "dtype_names": dtypes, "shapes": shapes}}
    with listen_on("127.0.0.1", 0) as mute:
        place = {"master_address": "127.0.0.1", "master_port": mute.getsockname()[1], "rank_offset": 1, "world_size": 3}
        waiting = run_beside(lambda: post(server, "/init_weight_transfer_engine", init_info=place), "init")
        mute.accept()[0].close()
        trainer.join(3, "")
        vllm(server, "/init_weight_transfer_engine", init_info=place | {"master_port": trainer.port})
        answer = waiting.result()
        assert answer.status_code == 400 and "was left meanwhile" in answer.json()["error"]["message"]
    assert trainer.wait() == "done"
    waiting = run_beside(lambda: post(server, "/update_weights", **info), "update")
    trainer.send(path, names[:1])
    assert trainer.wait() == "done"  # all have taken it, and wait for the next
    assert post(server, "/destroy_weights_update_group", group_name="weight transfer engine").json()["success"]
    answer = waiting.result()
    assert answer.status_code == 400 and "was left meanwhile" in answer.json()["error"]["message"]
    assert tokens(server) == case.tokens["old"]


@pytest.mark.parametrize("flat", [pytest.param(None, marks=pytest.mark.slow), 4000])
def test_vllms_routes_publish_the_version_at_the_end(case, server, trainer, flat):
    path = weights(case)
    size = httpx.get(f"{server.url}/get_world_size").json()["world_size"]
    trainer.join(size + 1, "")
    place = {"master_address": "127.0.0.1", "master_port": trainer.port, "rank_offset": 1, "world_size": size + 1}
    assert vllm(server, "/init_weight_transfer_engine", init_info=place)["message"] == "Weight transfer initialized"
    assert trainer.wait() == "done"
    names, dtypes, shapes = describe(path)
    info = {"names": names, "dtype_names": dtypes, "shapes": shapes, "packed": flat is not None}
    if flat is not None:
        info |= {"packed_buffer_size_bytes": flat, "packed_num_buffers": 2}
    vllm(server, "/start_weight_update", is_checkpoint_format=True)
    trainer.send(path, flat=flat)
    assert vllm(server, "/update_weights", update_info=info) == {"message": "Weights updated"}
    assert trainer.wait() == "done" and tokens(server) == case.tokens["old"]
    assert vllm(server, "/finish_weight_update", weight_version="step 3")["message"] == "Weight update finished"
    assert httpx.get(f"{server.url}/weight_info").json() == {"weight_version": "step 3"}
    assert tokens(server) == case.tokens["new"]
    back(server, case)
    answer = post(server, "/update_weights", update_info=info | {"names": []})
    assert answer.status_code == 400


def test_tensors_come_in_buffers_that_are_lent(case, server, trainer, tmp_path):
    """As checkpoint-engine does it: a socket and a buffer for each rank; a sender that gives up changes nothing."""
    path = weights(case)
    sockets = {f"CPU-{rank}": f"ipc://{tmp_path}/{rank}" for rank in range(2)}
    trainer.lend(path, list(sockets.values()), 1 << 19)
    answer = post(server, "/update_weights_from_ipc", zmq_handles=sockets, flush_cache=True, weight_version="step 4")
    assert answer.status_code == 200 and answer.json()["source"] == "ipc", answer.text
    assert trainer.wait() == "done" and tokens(server) == case.tokens["new"]
    back(server, case)
    trainer.lend(path, list(sockets.values()), 1 << 19, "exception")
    answer = post(server, "/update_weights_from_ipc", zmq_handles=sockets)
    assert answer.status_code == 400 and "the sender has given up: RuntimeError: no more" in answer.text
    assert trainer.wait() == "done"
    answer = post(server, "/update_weights_from_ipc", zmq_handles=sockets | {"CPU-1": "tcp://127.0.0.1:1"})
    assert answer.status_code == 400 and "lend buffers at ipc://" in answer.text
    answer = post(server, "/update_weights_from_ipc", zmq_handles={"GPU-1": sockets["CPU-0"]})
    assert answer.status_code == 400 and "has no socket for CPU-0, but for GPU-1" in answer.text
    assert tokens(server) == case.tokens["old"]
