"""Servers whose weights change while requests run: from files and from each other, forth and back, and with faults."""

import shutil
from pathlib import Path

import cluster
import httpx
import pytest
import ramet
import random_models as rm
import torch
from ramet.srt.model_loader.delta_writer import write_delta
from safetensors.torch import load_file, save_file
from server_process import Background, ServerProcess
from trainers import Trainer, describe
from updated_servers import (
    GREEDY,
    NUM_TOKENS,
    PROMPT,
    SEED,
    SMALL,
    Case,
    Load,
    checksums,
    post,
    tokens,
    update,
    versions,
)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return Case(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def seed(case, tmp_path_factory):
    """Two ranks, whose weights others can take."""
    log = tmp_path_factory.mktemp("seed") / "log"
    with ServerProcess(case.models["old"], log, "--tp-size", "2", SEED, *SMALL, fake=False) as server:
        yield server.wait_ready()


def test_weights_change_under_load_and_back(case, seed):
    before = checksums(seed)
    assert tokens(seed) == case.tokens["old"] and versions(seed) == [("default", True)]
    load = Load(seed, list(case.tokens.values()))
    try:
        answer = update(seed, case.models["new"], weight_version="step 1", flush_cache=True, token_step=0)
    finally:
        load.end()
    assert load.seen and answer["success"] and answer["weight_version"] == "step 1" and answer["mode"] == "staged"
    assert answer["source"] == "checkpoint" and answer["num_bytes"] > 0
    assert 0 < answer["pause_seconds"] < 1 and answer["stage_seconds"] > 0 and answer["num_paused_requests"] <= 1
    assert tokens(seed) == case.tokens["new"]
    assert versions(seed) == [("step 1", True), ("default", False)]
    assert httpx.get(f"{seed.url}/model_info").json()["model_path"] == str(case.models["new"])
    after = checksums(seed)
    assert after != before
    answer = post(seed, "/rollback_weights").json()
    assert answer["success"] and answer["weight_version"] == "default" and answer["source"] == ""
    assert tokens(seed) == case.tokens["old"] and checksums(seed) == before
    assert versions(seed) == [("default", True), ("step 1", False)]
    assert post(seed, "/rollback_weights").json()["weight_version"] == "step 1"
    assert checksums(seed) == after
    assert post(seed, "/rollback_weights").json()["success"] and checksums(seed) == before


def test_what_is_refused_changes_nothing(case, seed, tmp_path):
    before, known = checksums(seed), versions(seed)
    cut = Path(shutil.copytree(case.models["new"], tmp_path / "cut"))
    path = cut / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    half = Path(shutil.copytree(case.models["new"], tmp_path / "half"))
    weights = load_file(half / "model.safetensors")
    save_file({name: tensor for name, tensor in weights.items() if ".1." not in name}, half / "model.safetensors")
    other = rm.make_model(tmp_path / "other", "llama3", rope_theta=7000.0)
    for folder, words in ((cut, "cut/model.safetensors"), (half, "lacks"), (other, "is another model"), ("/no", "/no")):
        answer = post(seed, "/update_weights_from_disk", model_path=str(folder))
        assert answer.status_code == 400 and answer.json()["success"] is False
        assert words in answer.json()["message"], answer.text
    for path, body in (
        ("/update_weights_from_disk", {"model_path": str(case.models["new"])}),
        ("/update_weights_from_instance", {"address": "127.0.0.1:1"}),
        ("/update_weights_delta", {"path": "/none"}),
    ):
        answer = post(seed, path, **body, weights_digest="zz")
        assert answer.status_code == 400 and "weights_digest" in answer.text
    answer = post(seed, "/update_weights_from_disk", model_path=str(case.models["new"]), weights_digest="0" * 64)
    assert answer.status_code == 400 and "have the digest" in answer.text
    answer = post(seed, "/update_weights_from_disk", model_path="x", load_format="gguf")
    assert answer.status_code == 400 and "load_format" in answer.text
    answer = post(seed, "/update_weights_from_instance", address="127.0.0.1:1")
    assert answer.status_code == 400 and "it is not there" in answer.text
    assert checksums(seed) == before and [name for name, _ in versions(seed)][0] == known[0][0]
    assert tokens(seed) == case.tokens["old"]


def test_requests_can_be_ended_before_the_switch(case, seed):
    stream = Background(seed.url, input_ids=PROMPT, sampling_params={**GREEDY, "max_new_tokens": 400})
    stream.begun.wait(30)
    update(seed, case.models["new"], abort_all_requests=True)
    assert '"type":"abort"' in stream.join()[-2]
    assert tokens(seed) == case.tokens["new"]
    assert post(seed, "/rollback_weights").json()["success"]
    assert tokens(seed) == case.tokens["old"]


def test_numbers_and_checksums_are_those_of_the_checkpoint(case, seed):
    """Put together over both ranks, whose parts are rows of one tensor and columns of another."""
    weights = load_file(case.models["old"] / "model.safetensors")
    layer = "model.layers.1"
    for name in (
        f"{layer}.self_attn.k_proj.weight",
        f"{layer}.mlp.down_proj.weight",
        f"{layer}.input_layernorm.weight",
    ):
        answer = post(seed, "/get_weights_by_name", name=name)
        assert answer.json() == weights[name][:100].float().tolist()
    fused = torch.cat([weights[f"{layer}.self_attn.{one}_proj.weight"] for one in "qkv"])
    answer = post(seed, "/get_weights_by_name", name=f"{layer}.self_attn.qkv_proj.weight", truncate_size=150)
    assert answer.json() == fused[:150].float().tolist()
    answer = post(seed, "/get_weights_by_name", name="lm_head.weight", truncate_size=2)
    assert answer.json() == weights["model.embed_tokens.weight"][:2].float().tolist()
    answer = post(seed, "/get_weights_by_name", name="model.layers.9.mlp.up_proj.weight")
    assert answer.status_code == 400 and "there is no tensor" in answer.json()["error"]["message"]
    answer = post(seed, "/weights_checker").json()
    assert [list(rank["checksums"].values()) for rank in answer["ranks"]] == checksums(seed)
    assert [rank["parallelism_info"]["tp_rank"] for rank in answer["ranks"]] == [0, 1]
    assert all(len(rank["per_gpu_checksum"]) == len(answer["per_engine_checksum"]) == 64 for rank in answer["ranks"])
    again = post(seed, "/weights_checker", action="checksum", selector="target", skip_tensor_list=[]).json()
    assert again == answer
    answer = post(seed, "/weights_checker", selector="draft")
    assert answer.status_code == 400 and answer.json()["success"] is False


def test_weights_that_are_reset_serve_nothing_until_they_are_restored(case, seed):
    before = checksums(seed)
    answer = post(seed, "/weights_checker", action="compare")
    assert answer.status_code == 400 and "no snapshot" in answer.json()["message"]
    assert post(seed, "/weights_checker", action="snapshot").json()["success"]
    stream = Background(seed.url, input_ids=PROMPT, sampling_params={**GREEDY, "max_new_tokens": 400})
    stream.begun.wait(30)
    assert post(seed, "/weights_checker", action="reset_tensors").json()["success"]
    assert '"type":"abort"' in stream.join()[-2]
    answer = post(seed, "/generate", input_ids=PROMPT, sampling_params=GREEDY)
    assert answer.status_code == 503 and "have been reset" in answer.json()["error"]["message"]
    assert versions(seed)[0] == ("reset", False)
    assert seed.status(f"{seed.url}/ready") == 503
    assert httpx.get(f"{seed.url}/health").json() == {"status": "awaiting_weights"}
    assert httpx.get(f"{seed.url}/remote_instance_transfer_engine_info?rank=0").status_code == 503
    answer = post(seed, "/weights_checker", action="compare")
    assert answer.status_code == 400 and "rank 0" in answer.text and "rank 1" in answer.text
    assert post(seed, "/update_weights_from_disk", model_path="/no").status_code == 400
    assert seed.status(f"{seed.url}/ready") == 503
    for restore in (lambda: post(seed, "/rollback_weights"), lambda: update(seed, case.models["old"])):
        restore()
        assert post(seed, "/weights_checker", action="compare").json()["success"]
        assert seed.status(f"{seed.url}/ready") == 200 and tokens(seed) == case.tokens["old"]
        assert checksums(seed) == before and "reset" not in dict(versions(seed))
        post(seed, "/weights_checker", action="reset_tensors")
    post(seed, "/rollback_weights")


@pytest.fixture(scope="module")
def peer(case, tmp_path_factory):
    """One rank with the new weights."""
    log = tmp_path_factory.mktemp("peer") / "log"
    with ServerProcess(case.models["new"], log, SEED, *SMALL, fake=False) as server:
        yield server.wait_ready()


def from_instance(server, peer, **body):
    return post(server, "/update_weights_from_instance", address=peer.url.removeprefix("http://"), **body)


def test_weights_come_from_an_instance_of_another_topology(case, seed, peer):
    """Forth to two ranks from one; and from them to one, which maps nothing that changes under it."""
    before = checksums(seed)
    answer = from_instance(seed, peer, weight_version="from the peer")
    assert answer.status_code == 200 and answer.json()["source"] == "local_copy", answer.text
    assert tokens(seed) == case.tokens["new"]
    assert post(seed, "/rollback_weights").json()["success"] and checksums(seed) == before
    answer = from_instance(peer, seed)
    assert answer.status_code == 200, answer.text
    assert tokens(peer) == case.tokens["old"] and tokens(seed) == case.tokens["old"]
    assert post(peer, "/rollback_weights").json()["success"] and tokens(peer) == case.tokens["new"]


def test_a_mapped_clone_keeps_the_weights_that_it_took(case, peer, tmp_path):
    """While its seed changes them, and takes them back; and it can change them itself."""
    host = peer.url.removeprefix("http://")
    source = ("--load-format", "remote_instance", "--remote-instance-weight-loader-seed-instance-ip", host)
    flags = (*source, "--remote-instance-weight-loader-fallback", "error", SEED, *SMALL)
    with ServerProcess(
        rm.without_weights(case.models["old"], tmp_path / "m"), tmp_path / "log", *flags, fake=False
    ) as one:
        one.wait_ready()
        assert "local_map" in one.output and tokens(one) == case.tokens["new"]
        update(peer, case.models["old"])
        assert tokens(peer) == case.tokens["old"] and tokens(one) == case.tokens["new"]
        answer = from_instance(one, peer)
        assert answer.status_code == 200 and answer.json()["source"] == "local_map", answer.text
        assert tokens(one) == case.tokens["old"]
        assert post(peer, "/rollback_weights").json()["success"]
        assert tokens(peer) == case.tokens["new"] and tokens(one) == case.tokens["old"]
        assert post(one, "/rollback_weights").json()["success"] and tokens(one) == case.tokens["new"]


@pytest.mark.slow
@pytest.mark.parametrize("sizes", cluster.usual_or_all(["--dp-size 2"], ["--pp-size 2"]))
def test_every_rank_of_every_topology_changes(tmp_path, sizes):
    case = Case(tmp_path, num_hidden_layers=4)
    flags = (*sizes.split(), "--load-balance-method", "round_robin", *SMALL)
    with ServerProcess(case.models["old"], tmp_path / "log", *flags, fake=False) as server:
        load = Load(server.wait_ready(), list(case.tokens.values()), num_switches=2)
        for name in ("new", "old"):
            update(server, case.models[name])
            assert [tokens(server) for _ in range(4)] == [case.tokens[name]] * 4
        load.end()
        name, num_replicas = "model.layers.3.mlp.down_proj.weight", 2 if "--dp-size" in sizes else 1
        wanted = load_file(case.models["old"] / "model.safetensors")[name][:2].float().tolist()
        answer = post(server, "/get_weights_by_name", name=name, truncate_size=2).json()
        assert answer == ([wanted] * num_replicas if num_replicas > 1 else wanted)
        ranks = post(server, "/weights_checker").json()["ranks"]
        assert [rank["parallelism_info"]["rank"] for rank in ranks] == list(range(len(ranks)))


@pytest.mark.slow
@pytest.mark.parametrize("name", cluster.usual_or_all(["pp2_tp2_nodes2"], ["dp2_tp2_nodes2"]))
def test_ranks_on_other_nodes_change_too(tmp_path, name):
    case, sizes = Case(tmp_path / "models", num_hidden_layers=4), cluster.CASES[name]

    def change(head, path, **body):
        status, answer = head.request(path, body)
        assert status == 200 and answer["success"], answer

    with (
        cluster.Network(2) as network,
        cluster.Cluster(sizes, network.hosts, case.models["old"], tmp_path, SEED) as one,
    ):
        head = one.wait_ready().head
        for path, version in (("/update_weights_from_disk", "new"), ("/rollback_weights", "old")):
            body = {"model_path": str(case.models[version])} if version == "new" else {}
            change(head, path, **body)
            assert [head.generate(PROMPT, NUM_TOKENS) for _ in range(4)] == [case.tokens[version]] * 4
            cluster.check_registrations(head, sizes)
        missing = tmp_path / "none"
        status, answer = head.request("/update_weights_from_disk", {"model_path": str(missing)})
        assert status == 400 and answer["success"] is False


def test_an_engine_changes_its_weights(case, peer, tmp_path):
    """By SGLang's names for it; what goes wrong is an error."""
    paths = {name: case.models[name] / "model.safetensors" for name in case.models}
    tensors = {name: load_file(path) for name, path in paths.items()}
    strategy = torch.multiprocessing.get_sharing_strategy()
    with ramet.Engine(model_path=str(case.models["old"]), max_total_tokens=2048, max_running_requests=8) as engine:

        def tokens_of(version):
            output = engine.generate(input_ids=PROMPT, sampling_params=GREEDY)
            assert output["meta_info"]["weight_version"] == version
            return output["output_ids"]

        assert tokens_of("default") == case.tokens["old"]
        answer = engine.update_weights_from_disk(str(case.models["new"]), weight_version="step 1")
        assert answer["success"] and answer["weight_version"] == "step 1" and tokens_of("step 1") == case.tokens["new"]
        rows = engine.get_weights_by_name("model.norm.weight", truncate_size=3)
        assert rows == load_file(case.models["new"] / "model.safetensors")["model.norm.weight"][:3].float().tolist()
        assert engine.rollback_weights()["weight_version"] == "default" and tokens_of("default") == case.tokens["old"]
        engine.update_weight_version("base")
        answer = engine.update_weights_from_instance(peer.url.removeprefix("http://"))
        assert answer["source"] == "local_map" and tokens_of("update-2") == case.tokens["new"]
        names = [one["weight_version"] for one in engine.weight_versions()["versions"]]
        assert names == ["update-2", "base"]
        engine.pause_generation("retract")
        assert engine.flush_cache()
        engine.continue_generation()
        for wrong in (
            lambda: engine.update_weights_from_disk("/no"),
            lambda: engine.update_weights_from_disk(str(case.models["old"]), load_format="gguf"),
            lambda: engine.update_weights_from_instance(),
            lambda: engine.update_weight_version(""),
            lambda: engine.get_weights_by_name("no"),
            lambda: engine.pause_generation("soon"),
            lambda: engine.update_weights_delta("/no"),
            lambda: engine.begin_weight_update("draft"),
            lambda: engine.end_weight_update(),
            lambda: engine.update_weights_from_tensor([("lm_head.weight", 1)]),
            lambda: engine.update_weights_from_tensor([("no", torch.zeros(2))]),
            lambda: engine.update_weights_from_tensor(["?"]),
            lambda: engine.update_weights_from_tensor(list(tensors["old"].items()), "gguf"),
            lambda: engine.destroy_weights_update_group("no"),
            lambda: engine.init_weights_update_group("127.0.0.1", 1, 0, 2, backend="gloo"),
            lambda: engine.update_weights_from_distributed(["a"], [torch.bfloat16], [[1]], "no"),
            lambda: engine.update_weights_from_ipc({}),
        ):
            with pytest.raises(ValueError):
                wrong()
        assert tokens_of("update-2") == case.tokens["new"]

        answer = engine.update_weights_from_tensor(list(tensors["old"].items()), weight_version="sent")
        assert answer["source"] == "tensors" and tokens_of("sent") == case.tokens["old"]
        assert torch.multiprocessing.get_sharing_strategy() == strategy
        write_delta(str(tmp_path / "delta"), tensors["old"], tensors["new"])
        answer = engine.update_weights_delta(str(tmp_path / "delta"), "sent", weight_version="delta")
        assert answer["source"] == "delta" and tokens_of("delta") == case.tokens["new"]
        engine.begin_weight_update()
        parameters = [(name, torch.nn.Parameter(tensor)) for name, tensor in tensors["old"].items()]
        for part in (parameters[:3], parameters[3:]):
            answer = engine.update_weights_from_tensor(part)
            assert answer["num_bytes"] == sum(tensor.nbytes for _, tensor in part) and "weight_version" not in answer
        assert tokens_of("delta") == case.tokens["new"]
        assert engine.end_weight_update("session")["weight_version"] == "session"
        assert tokens_of("session") == case.tokens["old"]
        engine.begin_weight_update()
        engine.update_weights_from_tensor(parameters[:3])
        assert engine.end_weight_update(discard=True) is None and tokens_of("session") == case.tokens["old"]
        with Trainer() as trainer:
            trainer.join(2, "policy")
            engine.init_weights_update_group("127.0.0.1", trainer.port, 1, 2, "policy", "gloo")
            names, _, shapes = describe(paths["new"])
            dtypes = [tensors["new"][name].dtype for name in names]
            assert trainer.wait() == "done"
            trainer.send(paths["new"])
            answer = engine.update_weights_from_distributed(names, dtypes, shapes, "policy", weight_version="sent")
            assert answer["source"] == "broadcast" and tokens_of("sent") == case.tokens["new"]
            assert trainer.wait() == "done"
            trainer.send(paths["old"])
            for count in (0, len(names)):  # what was sent with the first is not for the second
                with pytest.raises(ValueError):
                    engine.update_weights_from_distributed(names, dtypes[:count], shapes, "policy")
            engine.destroy_weights_update_group("policy")
            assert trainer.wait()
            trainer.lend(paths["old"], [f"ipc://{tmp_path}/0"], 1 << 19)
            answer = engine.update_weights_from_ipc({"CPU-0": f"ipc://{tmp_path}/0"}, weight_version="lent")
            assert answer["source"] == "ipc" and tokens_of("lent") == case.tokens["old"]
