"""Flags from the command line and from a file: the same values by both ways, and what is said of what is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
import ramet
from ramet.srt.cli_parser import CliParser
from ramet.srt.command_line import add_cli_args, parse_server_args, read_command_line
from ramet.srt.config_file import read_config_file
from ramet.srt.flags.flag import flag_name
from ramet.srt.server_flags import NEEDLESS, SECTIONS, sectioned_fields

# Values of flags that take text of a kind; of the others any text will do here.
TEXTS = {
    "modelexpress_config": '{"url": "h:1", "wait_timeout": 5}',
    "remote_instance_weight_loader_send_weights_group_ports": "[1, 2]",
    "weight_version": "1.10",
    "served_model_name": ("a, b", "- c", "1.10"),
    "lora_paths": ("a=b", '{"lora_name": "x"}'),
    "remote_instance_weight_loader_seed_instance_ip": "a:1,b:2",
}


@pytest.fixture
def parser() -> CliParser:
    parser = CliParser(allow_abbrev=False)
    add_cli_args(parser)
    return parser


def value_of(field: Any) -> Any:
    """A value of the field that is not its default."""
    if field.name in TEXTS:
        return TEXTS[field.name]
    if field.default is False:
        return True
    if choices := field.metadata["choices"]:
        return next(one for one in choices if one != field.default)
    kinds = str(field.type)
    return 1 if "int" in kinds else 0.25 if "float" in kinds else ("x", "y") if "tuple" in kinds else "some: text # é"


def in_file(value: Any) -> Any:
    """The value as somebody might write it in a file."""
    if isinstance(value, tuple):
        return [in_file(one) for one in value]
    return json.loads(value) if isinstance(value, str) and value[:1] in "{[" else value


def test_every_flag_can_stand_in_a_file(parser: CliParser, tmp_path: Path) -> None:
    fields = [field for _, fields in sectioned_fields() for field in fields]
    values = {field.name: value_of(field) for field in fields}
    config = {
        (field.name if number % 2 else flag_name(field.name).lstrip("-")): in_file(values[field.name])
        for number, field in enumerate(fields)
    }
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(config | dict.fromkeys(name[2:] for name in NEEDLESS) | {"enable-metrics": True}))
    read = vars(parser.parse_args(read_config_file(str(path), parser)))
    assert read.pop("needless") == ["--enable-metrics"]
    assert {name: tuple(value) if isinstance(value, list) else value for name, value in read.items()} == values
    assert len(values) > 80


def test_a_file_as_people_write_it(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        "# comments are fine\nmodel: org/name   # an alias of model-path\nserved_model_name: 1.10\ntp: 2\n"
        "chunked-prefill-size: -1\nlog_requests: true\nenable-lora: false\nquantization: null\napi-key: 'null'\n"
        "weight-version: 2026-11-29\n--host: 0.0.0.0\n"
        "remote-instance-weight-loader-seed-instance-ip: [a:1, b:2]\nload-format: remote_instance\n"
    )
    args = parse_server_args(["--config", str(path), "--tp-size", "4", "--served-model-name", "x", "y"])
    assert (args.model_path, args.tp_size, args.host, args.weight_version) == ("org/name", 4, "0.0.0.0", "2026-11-29")
    assert (args.chunked_prefill_size, args.log_requests, args.enable_lora, args.quantization) == (
        -1,
        True,
        False,
        None,
    )
    assert args.api_key == "null" and args.model_names == ("x", "y") and len(args.seeds) == 2
    assert parse_server_args(["--config", str(path)]).model_name == "1.10", "no number of YAML's"
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert parse_server_args(["m", "--config", str(tmp_path / "empty.yaml")]).model_path == "m"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("modle-path: m", "has modle-path, which is no flag (did you mean model-path?)"),
        ("xyz: 1", "has xyz, which is no flag"),
        *((f"{name}: x", f"has {name}, which is for the command line alone") for name in ("help", "version", "config")),
        ("verson: true", "has verson, which is no flag"),
        ("model-path: [x]", "c.yaml, model-path takes one value, not a list"),
        ("tp-size: [2, 4]", "c.yaml, tp-size takes one value, not a list"),
        ("port: 1\nport: 2", "has port and port, which are one flag"),
        ("tp: 1\ntensor_parallel_size: 2", "has tp and tensor_parallel_size, which are one flag"),
        ("log-requests: maybe", "log-requests must be true or false"),
        ("enable-lora: [true]", "enable-lora must be true or false"),
        ("- a\n- b", "must have flags and their values"),
        ("a: [", "is no YAML"),
        ("model: m\ntp-size: 0", "--tp-size must be at least 1; got 0"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError) as error:
        parse_server_args(["--config", str(tmp_path / "c.yaml")])
    assert reason in str(error.value)
    with pytest.raises(ValueError, match="^--config: /no/file can't be read: No such file"):
        parse_server_args(["m", "--config", "/no/file"])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--modle-path", "m"], "unrecognized arguments: --modle-path (did you mean --model-path?)"),
        (["m", "--tp-sise=2"], "unrecognized arguments: --tp-sise=2 (did you mean --tp-size?)"),
        (["m", "--xyzzy"], "unrecognized arguments: --xyzzy\n"),
        (["m", "--served"], "unrecognized arguments: --served"),
        (["m", "--model", "n"], "two models: m and --model-path n"),
        (["m", "--port", "x"], "argument --port: invalid int value: 'x'"),
        ([], "the following arguments are required: --model-path"),
        (["m", "n"], "unrecognized arguments: n"),
    ],
)
def test_what_is_wrong_on_a_command_line_is_one_line(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        parse_server_args(argv, "ramet serve")
    assert end.value.code == 1
    error = capsys.readouterr().err
    assert words in error and error.startswith("ramet serve: error: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    "argv",
    [["m", "--tp", "2"], ["--tp", "2", "m"], ["--model", "m", "--tp", "2"], ["m", "--model", "m", "--tp-size=2"]],
)
def test_the_model_may_stand_alone(argv: list[str]) -> None:
    args = parse_server_args(argv)
    assert (args.model_path, args.tp_size) == ("m", 2)


def test_needless_flags_are_taken_with_a_line() -> None:
    line = read_command_line(["m", *NEEDLESS, "--enable-metrics"], "ramet serve")
    assert line.server_args.model_path == "m" and len(line.notes) == len(NEEDLESS)
    assert line.notes[0] == "--enable-metrics is not needed: /metrics is always there"


def test_help_is_in_groups_and_the_version_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, words in ((["-h"], [f"\n{section}:\n" for section in SECTIONS]), (["--version"], [ramet.__version__])):
        with pytest.raises(SystemExit) as end:
            parse_server_args(argv)
        text = capsys.readouterr().out
        assert end.value.code == 0 and all(word in text for word in words)
    assert set(read_order()) == set(SECTIONS)


def read_order() -> list[str]:
    return [section for section, fields in sectioned_fields() if fields]


def test_one_name_or_several_and_certificates_that_fit(tmp_path: Path) -> None:
    from ramet.srt.server_args import ServerArgs

    assert ServerArgs(model_path="m").model_names == ("m",)
    assert ServerArgs(model_path="m", served_model_name="one").model_names == ("one",)
    assert ServerArgs(model_path="m", served_model_name=["a", "b", "a"]).model_names == ("a", "b")
    (tmp_path / "no.pem").write_text("nothing")
    for wrong, words in (
        ({"ssl_keyfile": "k"}, "--ssl-keyfile needs --ssl-certfile"),
        ({"ssl_keyfile_password": "k"}, "--ssl-keyfile-password needs --ssl-certfile"),
        (
            {"ssl_certfile": "/no.pem"},
            "--ssl-certfile and --ssl-keyfile: /no.pem and the key in it can't be used: No such",
        ),
        ({"ssl_certfile": str(tmp_path / "no.pem")}, "can't be used"),
        ({"cors_allow_origins": ("ui.example",)}, "--cors-allow-origins takes origins, as in https://ui.example"),
        ({"cors_allow_origins": ("https://a/",)}, "got 'https://a/'"),
        ({"root_path": "llm"}, "--root-path must be a path without a slash at its end"),
        ({"root_path": "/llm/"}, "got '/llm/'"),
        ({"otlp_traces_endpoint": "collector"}, "--otlp-traces-endpoint must be host:port"),
        ({"log_requests_level": 4}, "--log-requests-level must be from 0 to 3; got 4"),
        ({"decode_log_interval": 0}, "--decode-log-interval must be at least 1; got 0"),
    ):
        with pytest.raises(ValueError) as error:
            ServerArgs(model_path="m", **wrong)
        assert words in str(error.value)
