"""Servers that take tensors, in the shapes in which SGLang's trainers send them: two ranks."""

import base64
import os
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import torch
from pickled_tensors import flat_bucket, forked
from ramet.srt.model_loader.delta_writer import write_delta
from safetensors.torch import load_file
from server_process import ServerProcess
from updated_servers import SEED, SMALL, Case, Load, checksums, post, tokens, versions

TIMEOUT_S = 6.0


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return Case(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def server(case, tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log"
    sizes = ("--tp-size", "2", "--weight-session-timeout", str(TIMEOUT_S))
    with ServerProcess(case.models["old"], log, *sizes, SEED, *SMALL, fake=False) as server:
        yield server.wait_ready()


@pytest.fixture(autouse=True)
def _by_name():
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    yield
    torch.multiprocessing.set_sharing_strategy(before)


def weights(case, name):
    return load_file(case.models[name] / "model.safetensors")


def send(server, tensors, num_payloads=2, **body):
    made = flat_bucket(tensors) if body.get("load_format") == "flattened_bucket" else list(tensors.items())
    payloads = [base64.b64encode(forked(made)).decode() for _ in range(num_payloads)]
    return post(server, "/update_weights_from_tensor", serialized_named_tensors=payloads, **body)


def serves(case, server, name):
    return tokens(server) == case.tokens[name]


def test_one_call_is_an_update_by_itself_under_load(case, server):
    before = checksums(server)
    load = Load(server, list(case.tokens.values()))
    try:
        answer = send(server, weights(case, "new"), weight_version="step 1", flush_cache=True, torch_empty_cache=False)
    finally:
        load.end()
    assert answer.status_code == 200, answer.text
    said = answer.json()
    assert said["success"] and said["weight_version"] == "step 1" and said["source"] == "tensors"
    assert said["num_bytes"] == 2 * sum(tensor.nbytes for tensor in weights(case, "new").values())
    assert serves(case, server, "new") and versions(server) == [("step 1", True), ("default", False)]
    full = post(server, "/update_weights_from_disk", model_path=str(case.models["new"]))
    assert full.status_code == 200
    loaded = checksums(server)
    assert post(server, "/rollback_weights").status_code == 200 and checksums(server) == loaded != before
    assert post(server, "/update_weights_from_disk", model_path=str(case.models["old"])).status_code == 200
    assert checksums(server) == before


def test_a_session_of_several_buckets(case, server):
    """The old version serves until its end; a late call is refused, and so is an end without a begin."""
    assert serves(case, server, "old")
    assert post(server, "/begin_weight_update", selector="all").status_code == 200
    assert post(server, "/begin_weight_update").status_code == 400
    tensors = weights(case, "new")
    names = sorted(tensors)
    for part in (names[::2], names[1::2]):
        answer = send(
            server, {name: tensors[name] for name in part}, load_format="flattened_bucket", weight_version="2"
        )
        assert answer.status_code == 200 and "bytes have come" in answer.json()["message"], answer.text
    assert serves(case, server, "old")
    answer = post(server, "/update_weights_from_disk", model_path=str(case.models["new"]))
    assert answer.status_code == 400 and "a session (/begin_weight_update) is open" in answer.text
    answer = post(server, "/end_weight_update")
    assert answer.status_code == 200 and answer.json()["weight_version"] == "2", answer.text
    assert serves(case, server, "new")
    assert post(server, "/end_weight_update").status_code == 400
    assert post(server, "/rollback_weights").status_code == 200 and serves(case, server, "old")


def test_a_trainer_that_is_killed_changes_nothing(case, server):
    """In the middle of a session, with its shared memory."""
    before = checksums(server)
    script, path = Path(__file__).parents[1] / "pickled_tensors.py", case.models["new"] / "model.safetensors"
    trainer = subprocess.Popen([sys.executable, script, path, "cpu"], stdout=subprocess.PIPE, text=True)
    payloads = [trainer.stdout.readline().strip() for _ in range(2)]
    trainer.kill()
    trainer.wait()
    deadline = time.monotonic() + 30
    while any(name.startswith(f"torch_{trainer.pid}_") for name in os.listdir("/dev/shm")):
        assert time.monotonic() < deadline
    assert post(server, "/begin_weight_update").status_code == 200
    answer = post(server, "/update_weights_from_tensor", serialized_named_tensors=payloads)
    assert answer.status_code == 400 and "is gone" in answer.text, answer.text
    assert "is gone" in post(server, "/end_weight_update").text
    assert checksums(server) == before and serves(case, server, "old")


def test_a_delta_on_top_of_what_serves(case, server, tmp_path):
    """Twice, forth and back; on another version it is refused."""
    before, ((name, _), *_) = checksums(server), versions(server)
    old, new = weights(case, "old"), weights(case, "new")
    names = sorted(old)[::3]
    mixed = old | {name: new[name] for name in names}
    forth, back = (str(tmp_path / name) for name in ("forth.delta", "back.delta"))
    table = write_delta(forth, old, mixed)
    digest = write_delta(back, mixed, old, base_table=table).digest
    for body, words in (
        ({"path": back}, "those that serve"),
        ({"path": forth, "base_version": "other"}, f"the delta is on top of the version 'other', and '{name}' serves"),
        ({"path": forth, "weights_digest": "0" * 64}, "makes weights of the digest"),
        ({"path": str(tmp_path / "none")}, "cannot read"),
    ):
        answer = post(server, "/update_weights_delta", **body)
        assert answer.status_code == 400 and words in answer.json()["message"], answer.text
    answer = post(server, "/update_weights_delta", path=forth, base_version=name, weight_version="mixed")
    assert answer.status_code == 200 and answer.json()["source"] == "delta", answer.text
    assert checksums(server) != before and versions(server) == [("mixed", True), (name, False)]
    answer = post(server, "/update_weights_delta", path=back, base_version="mixed", weights_digest=digest,
                  weight_version="default")  # fmt: skip
    assert answer.status_code == 200, answer.text
    assert checksums(server) == before and serves(case, server, "old")


def test_what_is_refused_or_never_ended_changes_nothing(case, server):
    before = checksums(server)
    tensors = weights(case, "new")
    norm = "model.norm.weight"
    for sent, words in (
        ({"model.layers.0.extra": tensors[norm]}, "the model has no tensor model.layers.0.extra"),
        ({norm: tensors[norm][:5]}, "model.norm.weight has the shape (5,)"),
    ):
        answer = send(server, sent)
        assert answer.status_code == 400 and words in answer.json()["message"], answer.text
    others = [list(tensors.items()), [*tensors.items()][:-1] + [(norm, tensors[norm] + 1)]]
    assert others[0][-1][0] == norm
    payloads = [base64.b64encode(forked(one)).decode() for one in others]
    answer = post(server, "/update_weights_from_tensor", serialized_named_tensors=payloads)
    assert answer.status_code == 400 and "the ranks were not sent the same tensors" in answer.text
    hostile = base64.b64encode(b"cos\nsystem\n.").decode()
    answer = post(server, "/update_weights_from_tensor", serialized_named_tensors=[hostile])
    assert answer.status_code == 400 and "it names os.system" in answer.text
    for payloads, words in ((["a", "b", "c"], "one for each of 2 tensor-parallel ranks"), (["%"], "must be base64")):
        answer = post(server, "/update_weights_from_tensor", serialized_named_tensors=payloads)
        assert answer.status_code == 400 and words in answer.text
    assert post(server, "/begin_weight_update", selector="draft").status_code == 400

    assert post(server, "/begin_weight_update").status_code == 200
    assert send(server, {norm: tensors[norm]}).status_code == 200
    assert send(server, {norm: tensors[norm]}).status_code == 400  # has come before
    answer = post(server, "/end_weight_update")
    assert answer.status_code == 400 and "has come before" in answer.text

    assert post(server, "/begin_weight_update").status_code == 200
    assert send(server, {norm: tensors[norm]}).status_code == 200
    deadline = time.monotonic() + 10 * TIMEOUT_S
    while post(server, "/update_weight_version", new_version="default").status_code == 200:
        answer = post(server, "/rollback_weights")
        if "a session" not in answer.text:
            break
        assert time.monotonic() < deadline
    answer = send(server, tensors)
    assert answer.status_code == 400 and "given up" in answer.text
    answer = post(server, "/end_weight_update")
    assert answer.status_code == 400 and "given up after 6 s" in answer.text
    assert checksums(server) == before and serves(case, server, "old")
    assert httpx.get(f"{server.url}/health").status_code == 200
