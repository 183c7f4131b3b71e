"""What the flags make of one rank's runner and weights."""

import pytest
from ramet.srt import server_args
from ramet.srt.server_args import ServerArgs


def make_config(device_type="cpu", **fields):
    args = ServerArgs(model_path="org/model", **fields)
    return args.runner_config(device_type, dtype="bfloat16", quantization="")


@pytest.mark.parametrize(("device_type", "requests", "fraction"), [("cpu", 64, 0.5), ("cuda", 256, 0.85)])
def test_what_was_not_given_is_the_devices(device_type, requests, fraction):
    config = make_config(device_type)
    assert (config.max_running_requests, config.mem_fraction_static) == (requests, fraction)
    assert config.max_total_tokens is None and config.use_cuda_graph and config.num_local_ranks == 1
    given = make_config(device_type, max_running_requests=3, mem_fraction_static=0.1, max_total_tokens=99)
    assert (given.max_running_requests, given.mem_fraction_static, given.max_total_tokens) == (3, 0.1, 99)
    assert not make_config(device_type, disable_cuda_graph=True).use_cuda_graph


def test_weights_of_an_instance_that_is_no_seed():
    weights = make_config().weights
    assert (weights.name, weights.is_seed, weights.is_published) == ("org/model", False, False)
    assert weights.admin_api_key is None and weights.load.modelexpress_url is None


def test_a_source_publishes_under_the_name_that_it_was_given():
    text = '{"url": "host:1", "source": true, "model_name": "shared"}'
    weights = make_config(modelexpress_config=text, admin_api_key="admin").weights
    assert weights.is_seed and weights.is_published and weights.name == "shared" and weights.admin_api_key == "admin"
    assert (weights.load.modelexpress_url, weights.load.modelexpress_dtype) == ("host:1", "bfloat16")


@pytest.mark.parametrize(
    ("host", "offered_at"), [("127.0.0.1", "10.0.0.7"), ("localhost", "10.0.0.7"), ("0.0.0.0", "0.0.0.0"), ("n2", "n2")]
)
def test_other_nodes_are_told_no_loopback_address(monkeypatch, host, offered_at):
    monkeypatch.setattr(server_args, "local_address", lambda peer: "10.0.0.7")
    weights = make_config(host=host, nnodes=2, tp_size=2, dist_init_addr="10.0.0.1:5000").weights
    assert (weights.host, weights.control_host) == (offered_at, "10.0.0.7")
    alone = make_config(host=host).weights
    assert (alone.host, alone.control_host) == (host, None)
