"""An instance that changes its weights, as the metadata server and those who look there see it."""

import json
import shutil

import httpx
import random_models as rm
from modelexpress_harness import open_client, running_server, wait_until
from ramet.srt.model_loader.checkpoint.digest_store import load_table
from ramet.srt.modelexpress.client.publisher import READY, STALE
from safetensors.torch import load_file, save_file
from seed_server import write_random_model
from server_process import ServerProcess

FLAGS = ("--engine-info-bootstrap-port", "0", "--max-total-tokens", "256", "--device", "cpu")
BACKEND = ("--load-format", "remote_instance", "--remote-instance-weight-loader-backend", "modelexpress")
QUESTION = {"text": "The quick brown", "sampling_params": {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}}


def answer(server):
    return httpx.post(f"{server.url}/generate", json=QUESTION, timeout=30).json()["output_ids"]


def change(server, route, **body):
    return httpx.post(f"{server.url}/{route}", json=body, timeout=60)


def test_records_are_stale_before_the_switch_and_name_the_new_weights_after(tmp_path):
    model = write_random_model(tmp_path / "model", "llama2")
    rm.write_tokenizer(model)
    changed = shutil.copytree(model, tmp_path / "changed")
    tensors = load_file(model / "model.safetensors")
    save_file({name: tensor.flip(0).contiguous() for name, tensor in tensors.items()}, changed / "model.safetensors")
    weightless = rm.without_weights(model, tmp_path / "weightless")
    with running_server() as mx:
        config = ("--modelexpress-config", json.dumps({"url": mx.address, "model_name": "toy"}))
        source = ("--modelexpress-config", json.dumps({"url": mx.address, "model_name": "toy", "source": True}))
        client = open_client(mx.address)
        with ServerProcess(model, tmp_path / "log", *source, "--weights-digest", "files", *FLAGS, fake=False) as one:
            old = answer(one.wait_ready())
            (first,) = wait_until(lambda: client.list_sources(status=READY), what="a record that is READY")
            reply = change(one, "update_weights_from_disk", model_path=str(changed))
            assert reply.status_code == 200, reply.text
            new = answer(one)
            assert new != old
            (second,) = wait_until(lambda: client.list_sources(status=READY), what="the new record's being READY")
            assert second.worker_id != first.worker_id
            assert [ref.worker_id for ref in client.list_sources(status=STALE)] == [first.worker_id]
            with ServerProcess(weightless, tmp_path / "log2", *config, *BACKEND, *FLAGS, fake=False) as two:
                assert answer(two.wait_ready()) == new and "checkpoint" not in two.output
                assert change(one, "rollback_weights").json()["success"]
                digest = load_table(str(model)).digest
                for body, words in (
                    ({"version": "0" * 64}, "lists no ready instance of 'toy'"),
                    ({"version": digest, "model_name": "other"}, "lists no ready instance of 'other'"),
                    ({"version": digest, "weights_digest": "0" * 64}, "have the digest"),
                    ({"version": digest, "address": "a:1"}, "exactly one of"),
                ):
                    refused = change(two, "update_weights_from_instance", **body)
                    assert refused.status_code == 400 and words in refused.text, refused.text
                taken = change(two, "update_weights_from_instance", version=digest, weights_digest=digest)
                assert taken.status_code == 200, taken.text
                assert answer(two) == old
        client.close()
