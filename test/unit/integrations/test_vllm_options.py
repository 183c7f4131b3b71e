"""Owns the tests of what --model-loader-extra-config may say."""

import pytest
from ramet.srt.utils.net import SeedAddress
from ramet_vllm.options import Options


def test_all_options_reach_the_loader(tmp_path):
    key, certificates = tmp_path / "key", tmp_path / "ca.pem"
    key.write_text("secret\n")
    certificates.write_text("-----BEGIN CERTIFICATE-----")
    options = Options.parse({
        "seed": "a:30000, https://b:30001", "timeout": 5, "api_key_file": str(key), "ssl_ca_certs": str(certificates),
        "backend": "nccl", "local_mode": "off", "fallback": "error", "host": "10.0.0.1", "weights_digest": "ab" * 32,
        "weight_version": "step-7",
    })  # fmt: skip
    config = options.load_config()
    assert config.seeds == (SeedAddress("a", 30000), SeedAddress("b", 30001, "https"))
    assert (config.timeout_s, config.api_keys, config.ssl_ca_certs) == (5.0, ("secret",), str(certificates))
    assert (config.backend, config.local_mode, config.host) == ("nccl", "off", "10.0.0.1")
    assert config.weights_digest == "ab" * 32
    assert config.fallback == "error"  # files are vLLM's to read, whatever the option says
    assert (options.fallback, options.weight_version) == ("error", "step-7")


def test_seeds_that_a_metadata_server_names_see_no_key(tmp_path):
    key = tmp_path / "key"
    key.write_text("secret")
    options = Options.parse(
        {"modelexpress": "b:2", "modelexpress_wait": 5, "model_name": "m", "api_key_file": str(key)}
    )
    assert (options.modelexpress, options.modelexpress_wait_s, options.model_name) == ("b:2", 5.0, "m")
    config = options.load_config()
    assert (config.seeds, config.api_keys, config.shows_keys) == ((), ("secret",), False)
    assert config.modelexpress_url == "b:2"
    assert Options.parse({"seed": "a:1", "api_key_file": str(key)}).load_config().shows_keys


def test_files_are_not_read_where_they_could_be_others():
    """vLLM would compare them with nothing. They are themselves, though."""
    assert Options.parse({"seed": "a:1"}).fallback == "disk"
    assert Options.parse({"seed": "a:1", "weights_digest": "files"}).fallback == "disk"
    assert Options.parse({"seed": "a:1", "weights_digest": "ab" * 32}).fallback == "error"
    assert Options.parse({"seed": "a:1", "weight_version": "7"}).fallback == "error"


def test_several_seeds_may_be_a_list():
    assert Options.parse({"seed": ["a:1", "[::1]:2"]}).seeds == (SeedAddress("a", 1), SeedAddress("::1", 2))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "must be a JSON object"),
        ({}, "must name a seed, .* or a metadata server"),
        ({"seed": "a:1", "modelexpress": "b:2"}, "must name a seed, .* or a metadata server"),
        ({"modelexpress": "b:port"}, "modelexpress must be host:port"),
        ({"seed": "a:1", "model_name": "m"}, "model_name goes together with modelexpress alone"),
        ({"seed": ""}, "seed must be host:port"),
        ({"seed": 5}, "seed must be an address"),
        ({"seed": "a"}, "seed must be host:port"),
        ({"seed": "ftp://a:1"}, "seed must be host:port, http://"),
        ({"seed": "a:1", "seeds": "b:2"}, "unknown 'seeds'; known are seed, modelexpress, "),
        ({"seed": "a:1", "timeout": 0}, "timeout must be seconds"),
        ({"seed": "a:1", "timeout": True}, "timeout must be seconds"),
        ({"seed": "a:1", "timeout": "5"}, "timeout must be seconds"),
        ({"seed": "a:1", "backend": "modelexpress"}, "backend must be one of transfer_engine, nccl"),
        ({"seed": "a:1", "fallback": "none"}, "fallback must be one of disk, error"),
        ({"seed": "a:1", "local_mode": None}, "local_mode must be one of auto, map, copy, off"),
        ({"seed": "a:1", "api_key_file": "/nowhere/key"}, "api_key_file: can't read /nowhere/key"),
        ({"seed": "a:1", "ssl_ca_certs": "/nowhere/ca"}, "ssl_ca_certs: can't read /nowhere/ca"),
        ({"seed": "a:1", "weights_digest": "AB" * 32}, "weights_digest must be 64 hex digits"),
        ({"seed": "a:1", "weights_digest": "ab" * 32, "fallback": "disk"}, "without a look at their weights_digest"),
        ({"seed": "a:1", "weight_version": "7", "fallback": "disk"}, "without a look at their weight_version"),
        ({"seed": "a:1", "weight_version": "a\nb"}, "weight_version: .* printable"),
        ({"seed": "a:1", "api_key": "secret"}, "unknown 'api_key'"),
    ],
)
def test_what_is_not_sound_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Options.parse(given)


def test_a_key_file_holds_one_key(tmp_path):
    file = tmp_path / "key"
    for text in ("", "two keys", "two\nlines"):
        file.write_text(text)
        with pytest.raises(ValueError, match="must hold one key in one line"):
            Options.parse({"seed": "a:1", "api_key_file": str(file)})
