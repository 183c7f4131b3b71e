"""--modelexpress-config and the MX_* variables: what is wrong is named."""

import json
from pathlib import Path

import pytest
from ramet.srt.configs.modelexpress_config import ModelExpressConfig, parse_modelexpress_config, resolve_address
from ramet.srt.modelexpress.settings import check_environment, env_seconds


def test_every_key_is_read(tmp_path: Path) -> None:
    values = {
        "url": "host:1",
        "source": True,
        "transport": "transfer_engine",
        "model_name": "m",
        "tp_size": 2,
        "pp_size": 3,
        "ep_size": 4,
        "dtype": "bf16",
        "quantization": "fp8",
    }
    assert parse_modelexpress_config(json.dumps(values)) == ModelExpressConfig(**values)
    path = tmp_path / "modelexpress.json"
    path.write_text(json.dumps(values))
    assert parse_modelexpress_config(str(path)) == ModelExpressConfig(**values)


@pytest.mark.parametrize("text", [None, "{}"])
def test_nothing_gives_the_defaults(text: str | None) -> None:
    assert parse_modelexpress_config(text) == ModelExpressConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"urll": "x"}', "unknown key 'urll'; known are url, source,"),
        ('{"tp_size": "2"}', "tp_size must be int or null; got '2'"),
        ('{"tp_size": true}', "tp_size must be int or null; got True"),
        ('{"tp_size": 0}', "tp_size must be at least 1; got 0"),
        ('{"source": 1}', "source must be bool or null; got 1"),
        ('{"url": 8001}', "url must be str or null; got 8001"),
        ('{"url": ""}', "url must not be empty"),
        ('{"transport": "nixl"}', "transport must be one of transfer_engine; got 'nixl'"),
        ('{"url": ', "this is not JSON"),
        ('{"url": "a:1", "source": true, "url": "b:2"}', "the key 'url' comes twice"),
        ('{"url": "127.0.0.1:99999"}', "url must be host:port, the port from 1 to 65535; got '127.0.0.1:99999'"),
        ('{"url": "host:"}', "url must be host:port"),
        ('{"url": "host:0"}', "url must be host:port"),
        ('{"url": "host:x"}', "url must be host:port"),
        ('{"url": "::1"}', "url must be host:port"),
        ('{"url": "ho st:1"}', "url must be host:port"),
        ('{"url": "host:1/path"}', "url must be host:port"),
        ('{"url": "dns:///host:1"}', "url must be host:port"),
        ("", "must not be empty"),
        ("  ", "must not be empty"),
        ("[1]", "must be a JSON object or the path of a JSON file"),
        ("/nothing/here.json", "No such file"),
    ],
)
def test_what_is_wrong_is_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match="--modelexpress-config") as caught:
        parse_modelexpress_config(text)
    assert message in str(caught.value)


def test_a_file_that_holds_something_else_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("[]")
    with pytest.raises(ValueError, match=f"must be a JSON object in {path}"):
        parse_modelexpress_config(str(path))


@pytest.mark.parametrize(
    ("url", "environ", "address"),
    [
        (None, {}, "localhost:8001"),
        (None, {"MX_SERVER_ADDRESS": "a:1"}, "a:1"),
        (None, {"MX_SERVER_ADDRESS": "a:1", "MODEL_EXPRESS_URL": "http://b:2"}, "b:2"),
        ("https://c:3/", {"MODEL_EXPRESS_URL": "b:2"}, "c:3"),
        ("[::1]:8001", {}, "[::1]:8001"),
        ("127.0.0.1", {}, "127.0.0.1:8001"),
        ("http://[::1]", {}, "[::1]:8001"),
        (None, {"MODEL_EXPRESS_URL": "http://mx.example"}, "mx.example:8001"),
    ],
)
def test_addresses(url: str | None, environ: dict[str, str], address: str) -> None:
    assert resolve_address(url, environ) == address


def test_what_is_wrong_in_the_environment_is_named(tmp_path: Path) -> None:
    check_environment({})
    (tmp_path / "token").write_text("secret")
    (tmp_path / "empty").write_text("")
    check_environment({"MX_AUTH_TOKEN_PATH": str(tmp_path / "token"), "MX_TLS_CA_PATH": ""})
    for name, value in {
        "MX_AUTH_TOKEN_PATH": str(tmp_path / "none"),
        "MX_TLS_CA_PATH": str(tmp_path / "none"),
        "MX_HEARTBEAT_INTERVAL_SECS": "soon",
    }.items():
        with pytest.raises(ValueError, match=name):
            check_environment({name: value})
    with pytest.raises(ValueError, match="MX_AUTH_TOKEN_PATH: .*holds no token"):
        check_environment({"MX_AUTH_TOKEN_PATH": str(tmp_path / "empty")})
    with pytest.raises(ValueError, match="variable MX_SERVER_ADDRESS must be host:port.*got 'a:b'"):
        resolve_address(None, {"MX_SERVER_ADDRESS": "a:b"})


def test_durations_from_the_environment() -> None:
    assert env_seconds("X", 30, {}) == 30
    assert env_seconds("X", 30, {"X": "1.5"}) == 1.5
    for text in ("0", "-1", "abc", "nan", "inf"):
        with pytest.raises(ValueError, match="variable X must be a number of seconds above 0"):
            env_seconds("X", 30, {"X": text})
