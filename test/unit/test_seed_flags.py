"""Owns the tests of the flags that say where weights come from."""

import pytest
from ramet.srt.command_line import parse_server_args
from ramet.srt.utils.net import SeedAddress
from tls_server import make_certificates

BASE = ["--model-path", "m", "--load-format", "remote_instance"]
IP = "--remote-instance-weight-loader-seed-instance-ip"
PORT = "--remote-instance-weight-loader-seed-instance-service-port"
GROUP_PORTS = "--remote-instance-weight-loader-send-weights-group-ports"
NCCL = ["--remote-instance-weight-loader-backend", "nccl"]


@pytest.mark.parametrize(
    ("flags", "seeds"),
    [
        ([IP, "10.0.0.1", PORT, "30000"], [("10.0.0.1", 30000)]),
        ([IP, "a:1,b:2"], [("a", 1), ("b", 2)]),
        ([IP, "a:1", IP, "b:2"], [("a", 1), ("b", 2)]),
        ([IP, "a, b:2", PORT, "7"], [("a", 7), ("b", 2)]),
        ([IP, "[::1]:5,::2", PORT, "7"], [("::1", 5), ("::2", 7)]),
        ([IP, "[::1]", PORT, "7"], [("::1", 7)]),
        ([IP, "a:1,a:1"], [("a", 1)]),
        ([IP, "https://a:1,a:1,http://a:1"], [("a", 1, "https"), ("a", 1)]),
        ([IP, "https://[::1]:5,https://b", PORT, "7"], [("::1", 5, "https"), ("b", 7, "https")]),
    ],
)
def test_seeds_are_given_one_by_one_or_as_lists(flags, seeds):
    args = parse_server_args(BASE + flags)
    assert args.seeds == tuple(SeedAddress(*seed) for seed in seeds) == args.load_config().seeds


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (BASE, "needs --remote-instance-weight-loader-seed-instance-ip"),
        ([*BASE, IP, "a"], "the seed a has no port"),
        ([*BASE, IP, "a:b"], "must be host:port"),
        ([*BASE, IP, "https://a"], "the seed https://a has no port"),
        ([*BASE, IP, "https://a:1/v1"], "must be host:port"),
        ([*BASE, IP, "ftp://a:1"], "must be host:port, or https://host:port"),
        ([*BASE, IP, "a:1", "--ssl-ca-certs", "/absent"], "--ssl-ca-certs: no certificates in /absent: No such file"),
        ([*BASE, IP, "a:1", "--ssl-ca-certs", __file__], "--ssl-ca-certs: no certificates in .*py: "),
        ([*BASE, IP, ",", PORT, "7"], "needs --remote-instance-weight-loader-seed-instance-ip"),
        ([*BASE, IP, "a", PORT, "0"], "from 1 to 65535"),
        (["--model-path", "m", IP, "a:1"], "need --load-format remote_instance"),
        ([*BASE, IP, "a:1", GROUP_PORTS, "[1]"], "needs --remote-instance-weight-loader-backend nccl"),
        ([*BASE, IP, "a:1", *NCCL, GROUP_PORTS, "[1, 2]"], "one port for each of the 1 ranks"),
        ([*BASE, IP, "a:1", *NCCL, GROUP_PORTS, "[1, 1]", "--tp-size", "2"], "one port for each of the 2 ranks"),
        ([*BASE, IP, "a:1", *NCCL, GROUP_PORTS, "1,2"], "JSON list"),
        ([*BASE, IP, "a:1", *NCCL, GROUP_PORTS, "[70000]"], "JSON list"),
        ([*BASE, IP, "a:1", *NCCL, GROUP_PORTS, "[true]"], "JSON list"),
    ],
)
def test_what_makes_no_sense_is_an_error(flags, reason):
    with pytest.raises(ValueError, match=reason):
        parse_server_args(flags)


def test_a_seed_is_shown_the_own_keys():
    args = parse_server_args([*BASE, IP, "a:1", "--api-key", "user", "--admin-api-key", "admin"])
    assert args.load_config().api_keys == ("user", "admin")
    assert parse_server_args([*BASE, IP, "a:1"]).load_config().api_keys == ()


def test_a_source_that_a_metadata_server_names_never_sees_the_admin_key():
    express = ["--remote-instance-weight-loader-backend", "modelexpress", "--modelexpress-config", '{"url": "a:1"}']
    args = parse_server_args([*BASE, *express, "--api-key", "user", "--admin-api-key", "admin"])
    assert args.load_config().api_keys == ("user",)


def test_group_ports():
    args = parse_server_args([*BASE, IP, "a:1", *NCCL, GROUP_PORTS, "[4000, 4001]", "--tp-size", "2"])
    assert args.load_config().send_weights_group_ports == (4000, 4001)


def test_certificates_of_seeds(tmp_path):
    path = str(make_certificates(tmp_path) / "ca.pem")
    args = parse_server_args([*BASE, IP, "https://a:1", "--ssl-ca-certs", path])
    assert args.load_config().ssl_ca_certs == path


SEED = ["--model-path", "m", "--remote-instance-weight-loader-start-seed-via-transfer-engine"]
CLIENT = [*BASE, IP, "a:1"]
LOCAL_OFF = ["--remote-instance-weight-loader-local-mode", "off"]
SOURCE = ["--model-path", "m", "--modelexpress-config", '{"url": "embedded", "source": true}']


@pytest.mark.parametrize(
    ("flags", "on_loopback", "elsewhere"),
    [
        (["--model-path", "m"], "unused", "unused"),
        (SEED, "wanted", "required"),
        (SOURCE, "wanted", "required"),
        (CLIENT, "unused", "wanted"),
        (CLIENT + LOCAL_OFF, "wanted", "wanted"),
        (CLIENT + NCCL, "unused", "unused"),
        ([*CLIENT, *NCCL, *SEED[2:]], "wanted", "required"),
    ],
)
def test_the_transfer_engine_is_started_where_it_is_asked_for_or_needed(flags, on_loopback, elsewhere):
    for host, expected in (("127.0.0.1", on_loopback), ("::1", on_loopback), ("0.0.0.0", elsewhere)):
        args = parse_server_args([*flags, "--host", host])
        config = args.runner_config("cpu", dtype="bfloat16", quantization="").weights
        assert config.network == expected, host


def test_looks_at_the_weights_can_be_turned_off():
    for value, expected in (("0", 0.0), ("2.5", 2.5)):
        args = parse_server_args([*SEED, "--weights-check-interval", value])
        assert args.runner_config("cpu", dtype="bfloat16", quantization="").weights.check_interval_s == expected
    with pytest.raises(ValueError, match="--weights-check-interval must not be negative"):
        parse_server_args([*SEED, "--weights-check-interval", "-1"])
