"""Which flags a standby can be told, and how standbys are found on their host."""

import json
import os
import subprocess
import sys
import tempfile

import pytest
from ramet.srt.entrypoints.standby.from_standby import body_of, why_not
from ramet.srt.entrypoints.standby.host_record import HostRecord, RecordFile, find_records
from ramet.srt.entrypoints.standby.orders import BecomeBody
from ramet.srt.server_args import ServerArgs

SEED = {"load_format": "remote_instance", "remote_instance_weight_loader_seed_instance_ip": "h:1"}
RECORD = HostRecord(url="http://127.0.0.1:1", device="cpu")


@pytest.mark.parametrize(
    ("flags", "body"),
    [
        ({}, {"source": "files"}),
        ({"tp_size": 2, "port": 1, "log_level": "debug", "api_key": "k"}, {"source": "files", "tp_size": 2}),
        (
            {"served_model_name": "n", "dtype": "float16"},
            {"source": "files", "served_model_name": "n", "dtype": "float16"},
        ),
        (SEED, {"source": "auto", "seed": "h:1"}),
        ({**SEED, "remote_instance_weight_loader_fallback": "error"}, {"source": "instance", "seed": "h:1"}),
    ],
)
def test_what_a_standby_is_told(flags, body):
    args = ServerArgs(model_path="m", **flags)
    assert why_not(args) is None
    assert body_of(args) == {"model_path": "m", **body}
    BecomeBody.make(**body_of(args))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"max_total_tokens": 512}, "--max-total-tokens"),
        ({"modelexpress_config": '{"url": "h:1", "source": true}'}, "--modelexpress-config"),
        ({"served_model_name": ("a", "b")}, "one name"),
        ({"load_format": "dummy"}, "this way"),
        ({"cors_allow_origins": "*"}, "--cors-allow-origins"),
    ],
)
def test_what_none_can_be_told(flags, words):
    assert words in why_not(ServerArgs(model_path="m", **flags))


def test_a_folder_is_named_so_that_another_process_finds_it(tmp_path, monkeypatch):
    (tmp_path / "m").mkdir()
    monkeypatch.chdir(tmp_path)
    body = body_of(ServerArgs(model_path="m"))
    assert body["model_path"] == str(tmp_path / "m") and body["served_model_name"] == "m"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_standbys_are_found_while_they_live(folder):
    assert find_records() == []
    file = RecordFile(RECORD)
    assert find_records() == [RECORD]
    file.close()
    assert find_records() == [] and list(folder.iterdir()) == []


def test_one_that_was_killed_is_found_no_more(folder):
    code = """
import os, signal
from ramet.srt.entrypoints.standby.host_record import HostRecord, RecordFile
RecordFile(HostRecord(url="http://127.0.0.1:2", device="cpu"))
os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = {**os.environ, "TMPDIR": str(folder)}
    subprocess.run([sys.executable, "-c", code], env=environment, timeout=60, check=False)
    (left,) = folder.rglob("*.json")
    assert json.loads(left.read_text())["url"] == "http://127.0.0.1:2"
    assert find_records() == [] and not left.exists()


def test_a_folder_of_others_is_trusted_by_nobody(folder):
    made = folder / f"ramet-standbys-{os.getuid()}"
    made.mkdir()
    made.chmod(0o777)
    with pytest.raises(PermissionError):
        RecordFile(RECORD)
    assert find_records() == []
