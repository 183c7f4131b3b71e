"""A real server of two replicas, whose weights go by several names, and whose generation is paused."""

import json

import pytest
import random_models as rm
from modelexpress_harness import running_server
from server_process import ServerProcess

FLAGS = ("--dp-size", "2", "--max-total-tokens", "4096", "--max-running-requests", "4",
         "--engine-info-bootstrap-port", "0", "--admin-api-key", "admin", "--weight-version", "v1",
         "--enable-memory-saver")  # fmt: skip


@pytest.fixture(scope="package")
def model(tmp_path_factory):
    return rm.make_model(tmp_path_factory.mktemp("model"), "llama3", num_hidden_layers=4)


@pytest.fixture(scope="package")
def mx():
    with running_server() as server:
        yield server


@pytest.fixture(scope="package")
def server(model, mx, tmp_path_factory):
    flags = (*FLAGS, "--modelexpress-config", json.dumps({"url": mx.address, "source": True}))
    with ServerProcess(model, tmp_path_factory.mktemp("server") / "log", *flags, fake=False) as process:
        yield process.wait_ready()
    assert "Traceback" not in process.output
