"""What --modelexpress-config makes of an engine's configuration, and of the identity that seed and client share."""

import json
from typing import Any

import msgspec
import pytest
from modelexpress_harness import make_manifest
from ramet.srt.configs.load_config import LoadConfig
from ramet.srt.entrypoints.modelexpress_start import prepare_modelexpress
from ramet.srt.modelexpress.source_identity import compute_source_id, make_source_identity
from ramet.srt.server_args import ServerArgs

CLIENT = {"load_format": "remote_instance", "remote_instance_weight_loader_backend": "modelexpress"}


def make_args(config: dict[str, Any] | str | None = None, **fields: Any) -> ServerArgs:
    text = json.dumps(config) if isinstance(config, dict) else config
    return ServerArgs(model_path="org/model", modelexpress_config=text, **fields)


def load_config(config: dict[str, Any] | None = None, **fields: Any) -> LoadConfig:
    return make_args(config, **CLIENT | fields).load_config(dtype="bfloat16", quantization="fp8")


def test_values_come_from_the_engine_or_else_from_the_config() -> None:
    own = load_config({"url": "http://host:1"}, tp_size=2, ep_size=2)
    assert own.modelexpress_url == "host:1"
    assert (own.modelexpress_tp_size, own.modelexpress_pp_size, own.modelexpress_ep_size) == (2, 1, 2)
    assert (own.modelexpress_dtype, own.modelexpress_quantization) == ("bfloat16", "fp8")
    assert own.modelexpress_model_name == "org/model" and own.modelexpress_wait_s == 600
    given = {"model_name": "m", "tp_size": 2, "pp_size": 3, "ep_size": 1, "dtype": "d", "quantization": ""}
    other = load_config(given | {"wait_timeout": 5}, tp_size=2, pp_size=3)
    assert (other.modelexpress_tp_size, other.modelexpress_pp_size, other.modelexpress_ep_size) == (2, 3, 1)
    assert (other.modelexpress_model_name, other.modelexpress_dtype, other.modelexpress_quantization) == ("m", "d", "")
    assert other.modelexpress_wait_s == 5


def test_without_modelexpress_nothing_is_set() -> None:
    config = ServerArgs(model_path="m").load_config(dtype="bfloat16")
    assert config.modelexpress_url is None
    assert not ServerArgs(model_path="m").is_seed


@pytest.mark.parametrize("name", ["tp_size", "pp_size", "ep_size"])
def test_sizes_that_contradict_the_engine_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 4, but the engine runs with 1"):
        make_args({name: 4}, **CLIENT)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"url": 1}', "url must be str or null"),
        ('{"wait_timeout": "long"}', "wait_timeout must be float; got 'long'"),
        ('{"wait_timeout": -1}', "wait_timeout must be a number"),
        ('{"uri": "x"}', "unknown key 'uri'"),
        ('{"url": "x"', "not JSON"),
        ('{"quantization": "int3"}', 'quantization must be one of fp8, .*awq.*, or "" for none; got .int3.'),
        ("no-such-file.json", "no-such-file.json"),
        ('{"url": "embedded:x"}', "url must be embedded or embedded:PORT"),
    ],
)
def test_what_is_wrong_is_named(config: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_args(config, **CLIENT)


def test_combinations_that_mean_nothing_are_errors() -> None:
    with pytest.raises(ValueError, match="needs --load-format remote_instance"):
        make_args(remote_instance_weight_loader_backend="modelexpress")
    with pytest.raises(ValueError, match='without "source": true'):
        make_args({"url": "x"})
    with pytest.raises(ValueError, match="needs --remote-instance-weight-loader-backend modelexpress"):
        make_args({"url": "x"}, load_format="remote_instance")
    with pytest.raises(ValueError, match="seed-instance-ip"):
        make_args(**CLIENT, remote_instance_weight_loader_seed_instance_ip="a:1")
    with pytest.raises(ValueError, match="embedded:0 is for one node"):
        make_args({"url": "embedded:0"}, nnodes=2, tp_size=2, dist_init_addr="10.0.0.1:5000")


def test_roles() -> None:
    client = make_args(**CLIENT)
    assert client.is_seed and client.takes_weights_from_instances
    for seed in (make_args({"source": True}), make_args({"source": True}, **CLIENT), make_args({"url": "embedded"})):
        assert seed.is_seed and not seed.takes_weights_from_instances
        assert seed.load_config().load_format == "auto"


def test_seed_and_client_have_one_identity_and_other_weights_another() -> None:
    manifest = make_manifest()
    seed = make_args({"source": True}).load_config(dtype="bfloat16", quantization="fp8")
    identity = make_source_identity(seed, manifest)
    assert identity == make_source_identity(load_config(), manifest)
    others = [
        msgspec.structs.replace(manifest, role="draft"),
        msgspec.structs.replace(manifest, revision="other"),
    ]
    ids = {compute_source_id(make_source_identity(seed, other)) for other in (manifest, *others)}
    assert len(ids) == 3


@pytest.mark.parametrize(
    ("host", "url", "is_told"),
    [
        ("127.0.0.1", "10.0.0.9:8001", True),
        ("localhost", "mx.example", True),
        ("127.0.0.1", "127.0.0.1:8001", False),
        ("127.0.0.1", "[::1]:8001", False),
        ("10.0.0.1", "10.0.0.9:8001", False),
    ],
)
def test_an_instance_that_others_would_look_for_on_themselves_warns(
    host: str, url: str, is_told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    args = make_args({"url": url}, **CLIENT, host=host)
    assert args.modelexpress is not None
    prepare_modelexpress(args, args.modelexpress)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == is_told and all(f"it is at {host}" in line and "--host" in line for line in lines)
