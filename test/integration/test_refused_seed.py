"""Clients that can't or mustn't take a seed's weights, as processes: one clear line, and nothing is served."""

import socket
from pathlib import Path

from random_models import make_config, write_tokenizer
from server_process import ServerProcess


def bare_model(folder: Path, **overrides: int) -> Path:
    """A model folder without weights."""
    make_config(folder, "qwen2", **overrides)
    write_tokenizer(folder)
    return folder


def client_of(port: int, model: Path, log: Path) -> ServerProcess:
    flags = ["--load-format", "remote_instance", "--remote-instance-weight-loader-fallback", "error"]
    flags += ["--remote-instance-weight-loader-seed-instance-ip", "127.0.0.1", "--engine-info-bootstrap-port", "0"]
    flags += ["--remote-instance-weight-loader-seed-instance-service-port", str(port)]
    return ServerProcess(model, log, *flags, fake=False)


def assert_fails_in_one_line(client: ServerProcess, words: str) -> None:
    with client:
        assert client.wait_exit(60) == 1
    errors = [line for line in client.output.splitlines() if "error:" in line]
    assert len(errors) == 1 and words in errors[0], client.output
    assert "Traceback" not in client.output


def test_an_absent_seed_is_one_line(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # taken, but nobody listens
        client = client_of(unused.getsockname()[1], bare_model(tmp_path / "model"), tmp_path / "log")
        assert_fails_in_one_line(client, "it is not there (Connection refused)")


def test_a_larger_model_is_no_seed_for_a_smaller_one(tmp_path: Path) -> None:
    """Every box of the client lies inside the seed's larger tensors: that does not make them the same model's."""
    small, large = bare_model(tmp_path / "small"), bare_model(tmp_path / "large", hidden_size=192)
    flags = ["--load-format", "dummy", "--remote-instance-weight-loader-start-seed-via-transfer-engine"]
    flags += ["--engine-info-bootstrap-port", "0"]
    with ServerProcess(large, tmp_path / "seed-log", *flags, fake=False).wait_ready() as seed:
        client = client_of(int(seed.url.rsplit(":", 1)[1]), small, tmp_path / "log")
        assert_fails_in_one_line(client, "its hidden_size is 192, not 96")
