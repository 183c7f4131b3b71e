"""From a model's name to a folder, and the console script."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import ramet
from ramet import cli
from ramet.srt.server_args import ServerArgs
from ramet.srt.utils.hub import canonical_model_name, resolve_model_path, resolve_tokenizer_path


def test_a_folder_is_itself(tmp_path: Path) -> None:
    assert resolve_model_path(str(tmp_path)) == str(tmp_path)
    missing = str(tmp_path / "missing")
    assert resolve_tokenizer_path(str(tmp_path), missing, None) == str(tmp_path)
    assert resolve_tokenizer_path(None, str(tmp_path), None) == str(tmp_path)


@pytest.mark.parametrize("path", ["/no/such/model", "./a", "a/b/c", "../x", "~/model", "a/"])
def test_a_missing_folder_is_not_looked_for_on_the_hub(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **options: pytest.fail("asked the hub"))
    with pytest.raises(ValueError, match="does not exist"):
        resolve_model_path(path)


def weights_name(path: str, **express: str) -> str:
    return ServerArgs(model_path=path, modelexpress_config=json.dumps({"source": True, **express})).weights_name


def test_all_spellings_of_a_folder_are_one_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m" / "x").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "m" / "x")
    monkeypatch.chdir(tmp_path)
    whole = str((tmp_path / "m" / "x").resolve())
    spellings = ["m/x", "m/x/", "./m/x", "m//x", "m/../m/x", "link", "./link/", whole, whole + "/"]
    assert {weights_name(path) for path in spellings} == {whole}
    assert {weights_name("org/y", model_name=path) for path in ["./m/x", "m/x/", whole + "/", "./link"]} == {whole}
    assert weights_name("org/y", model_name="m/x") == "m/x", "a given name that may be the hub's stays"
    assert weights_name("Org/Model") == "Org/Model"


def test_a_snapshot_in_the_hubs_cache_goes_by_the_hubs_name(tmp_path: Path) -> None:
    for repository, name in (("models--org--Model-1.5", "org/Model-1.5"), ("models--gpt2", "gpt2")):
        snapshot = tmp_path / "hub" / repository / "snapshots" / ("0a" * 20)
        snapshot.mkdir(parents=True)
        assert canonical_model_name(str(snapshot)) == canonical_model_name(f"{snapshot}/") == name
    other = tmp_path / "models--org--m" / "snapshots" / "main"
    other.mkdir(parents=True)
    assert canonical_model_name(str(other)) == str(other.resolve()), "not a snapshot as the hub's cache names them"


@pytest.mark.parametrize("weights", [False, True])
def test_a_hub_id_is_fetched(weights: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda model, **options: calls.append((model, options)) or "/snapshot"
    )
    assert resolve_model_path("owner/model", "v1", weights) == "/snapshot"
    ((model, options),) = calls
    assert (model, options["revision"]) == ("owner/model", "v1")
    assert ("*.safetensors" in options["allow_patterns"]) is weights


def test_what_the_hub_refuses_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    def refuse(*args: object, **options: object) -> str:
        raise LocalEntryNotFoundError("no network\nand a long story")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(ValueError, match="neither a folder nor available from the hub: no network$"):
        resolve_model_path("owner/model")


def test_the_digest_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAMET_DIGEST_DIR", str(tmp_path / "kept"))
    (tmp_path / "m").mkdir()
    content = b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}'
    (tmp_path / "m" / "model.safetensors").write_bytes(len(content).to_bytes(8, "little") + content + b"xy")
    printed = []
    for again in ([], [], ["--again"]):
        assert cli.main(["digest", str(tmp_path / "m"), *again]) == 0
        printed.append(capsys.readouterr().out)
    assert len(set(printed)) == 1 and re.fullmatch("[0-9a-f]{64}\n", printed[0])
    assert len(list((tmp_path / "kept").glob("*.msgpack"))) == 1
    monkeypatch.setenv("RAMET_DIGEST_DIR", "/proc/none")
    assert cli.main(["digest", str(tmp_path / "m")]) == 0 and capsys.readouterr().out == printed[0]
    assert cli.main(["digest", str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err == f"ramet digest: error: model path {tmp_path / 'none'} does not exist\n"
    assert cli.main(["digest", str(tmp_path)]) == 1
    assert "there are no weights in" in capsys.readouterr().err


def test_console_script(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.main(["version"]) == 0
    assert capsys.readouterr().out.strip() == ramet.__version__
    assert cli.main(["--help"]) == 0
    assert "serve MODEL" in capsys.readouterr().out
    assert cli.main([]) == 1
    assert cli.main(["grow"]) == 1
    assert "unknown command 'grow'" in capsys.readouterr().err
    commands = re.findall(r"^  ([\w-]+)", cli.USAGE, re.MULTILINE)
    assert tuple(commands) == cli.COMMANDS
    for command in commands:
        assert cli.main([command[:-1]]) == 1
        assert f"(did you mean {command}?)" in capsys.readouterr().err
    launched = []
    monkeypatch.setattr("ramet.launch_server.main", lambda argv, prog: launched.append((argv, prog)) or 0)
    assert cli.main(["serve", "my/model", "--port", "0"]) == 0
    assert launched == [(["my/model", "--port", "0"], "ramet serve")]
    assert cli.main(["serve", "--model-path", "m"]) == 0
    assert launched[1][0] == ["--model-path", "m"]


def test_the_package_runs_as_the_console_script() -> None:
    command = [sys.executable, "-m", "ramet", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip() == ramet.__version__
