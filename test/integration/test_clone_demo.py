"""`make run` does what it says: an instance grows out of another one and gives the same answer."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).resolve().parents[2] / "examples" / "clone_demo.py"


def free_ports(count: int) -> list[str]:
    sockets = [socket.socket() for _ in range(count)]
    for probe in sockets:
        probe.bind(("127.0.0.1", 0))
    ports = [str(probe.getsockname()[1]) for probe in sockets]
    for probe in sockets:
        probe.close()
    return ports


def run_demo(tmp_path: Path, *flags: str) -> subprocess.CompletedProcess:
    seed, client, seed_bootstrap, client_bootstrap, express, fleet = free_ports(6)
    command = [sys.executable, str(DEMO), "--once", "--log-dir", str(tmp_path), "--seed-port", seed]
    command += ["--client-port", client, "--seed-bootstrap-port", seed_bootstrap]
    command += ["--client-bootstrap-port", client_bootstrap, "--modelexpress-port", express, "--fleet-port", fleet]
    command += ["--timeout", "120", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


@pytest.mark.parametrize(
    ("flags", "source"),
    [
        ([], "local_map"),
        (["--by-address", "--", "--remote-instance-weight-loader-local-mode", "off"], "transfer_engine"),
    ],
)
def test_client_grows_out_of_the_seed(tmp_path: Path, flags: list[str], source: str) -> None:
    result = run_demo(tmp_path, *flags)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "A ramet is one plant of a clonal colony." in result.stdout
    sources = next(line.split() for line in result.stdout.splitlines() if line.split()[:1] == ["source"])
    assert sources == ["source", "checkpoint", source]
    assert ("the fleet is shown at http://127.0.0.1:" in result.stdout) == ("--by-address" not in flags)
    assert "same answer" in result.stdout and "yes" in result.stdout


def test_a_model_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    result = run_demo(tmp_path, "--model-path", str(tmp_path / "nothing"))
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    assert str(tmp_path / "nothing") in result.stderr


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = run_demo(tmp_path, "--seed-port", str(port))
    assert result.returncode == 1
    assert str(port) in result.stderr and "--port" in result.stderr
