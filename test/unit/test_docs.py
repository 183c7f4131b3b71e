"""The documentation says what the code says: links, files, commands, flags and routes in it are there."""

import importlib.util
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
from doc_pages import (
    PAGES,
    ROOT,
    Block,
    blocks,
    commands,
    flags_of,
    inline_code,
    make_words,
    prose,
    script_behind_make,
    script_flags,
)
from ramet import cli
from ramet.srt.cli_parser import CliParser
from ramet.srt.command_line import add_cli_args, parse_server_args
from ramet.srt.entrypoints import directory_http
from ramet.srt.entrypoints.http_api import create_app
from ramet.srt.entrypoints.standby.launch_standby import make_parser as make_standby_parser
from ramet.srt.entrypoints.standby.park_command import make_parser as make_park_parser
from ramet.srt.entrypoints.standby.standby_app import make_standby_router
from ramet.srt.entrypoints.standby.standby_metrics import StandbyMetrics
from ramet.srt.modelexpress.client.fleet_command import make_parser as make_fleet_parser
from ramet.srt.modelexpress.server import command_line as modelexpress_command_line
from ramet.srt.modelexpress.server.fleet_app import make_fleet_app
from ramet.srt.modelexpress.server.fleet_service import FleetService
from ramet.srt.server_args import ServerArgs

LANGUAGES = {"bash", "json", "python", "text"}
BLOCKS = [block for page in PAGES for block in blocks(page)]
RUN_TIMEOUT_S = 60
SERVE = (["ramet", "serve"], ["python", "-m", "ramet.launch_server"])
SERVE_METADATA = (["ramet", "modelexpress-server"], ["python", "-m", "ramet.modelexpress_server"])
OURS = ("make", "ramet", "python", "curl", "bash")


@pytest.mark.parametrize("script", ["make_flags_doc", "make_http_doc", "make_dashboard"])
def test_what_the_code_writes_is_current(script: str) -> None:
    spec = importlib.util.spec_from_file_location(script, ROOT / "scripts" / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PATH.read_text() == module.render(), "run `make docs`"


# ---- what a page names ----


@cache
def files() -> tuple[Path, ...]:
    """The files of the repository."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    if listed.returncode == 0:
        return tuple(ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).exists())
    return tuple(path for path in ROOT.rglob("*.*") if path.is_file())  # an unpacked archive


def find(name: str) -> list[Path]:
    """The files that a page means by a name: `net.py`, `utils/net.py` or the whole path."""
    return [file for file in files() if str(file).endswith(f"/{name}")]


@cache
def words_of_the_code() -> frozenset[str]:
    sources = [
        file for file in files() if file.suffix in (".py", ".toml", ".proto", ".html") or file.name == "Makefile"
    ]
    return frozenset(word for file in sources for word in re.findall(r"\w+", file.read_text()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_files_exist(page: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", prose(page)) if "://" not in link]
    missing = [link for link in links if not (page.parent / link).exists()]
    codes = [code for code in inline_code(page) if ".run/" not in code]  # what benchmarks write
    named = [name for code in codes for name in re.findall(r"(?:[\w.]+/)*\w+\.(?:py|sh|md|proto)\b", code)]
    missing += [name for name in named if not find(name)]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_things_are_in_the_code(page: Path) -> None:
    """`snake_case` and `CamelCase` are names of ours, and "`name` in `file.py`" is where it is."""
    codes = [code for code in inline_code(page) if not code.startswith("ramet:")]  # metrics, whose names are composed
    pattern = r"(?<![\w/.-])([A-Za-z]\w*(?:_\w+)+|[A-Z][a-z]+[A-Z]\w+)"
    named = {name for code in codes for name in re.findall(pattern, code)}
    missing = [name for name in named if name not in words_of_the_code()]
    for names, place in re.findall(r"((?:`\w+`(?:, | and )?)+) in `([\w/]+\.py)`", prose(page)):
        texts = [file.read_text() for file in find(place)]
        missing += [(name, place) for name in re.findall(r"\w+", names) if not any(name in text for text in texts)]
    assert not missing


@cache
def server_flags() -> frozenset[str]:
    parser = CliParser()
    add_cli_args(parser)
    return frozenset(option for action in parser._actions for option in action.option_strings)


def metadata_parser() -> CliParser:
    return modelexpress_command_line.make_parser(dict.fromkeys(modelexpress_command_line.FLAGS), "ramet")


@cache
def all_flags() -> frozenset[str]:
    scripts = [
        path for folder in ("benchmark", "examples", "scripts", "test/manual") for path in (ROOT / folder).glob("*.py")
    ]
    (commands_of_fleets,) = make_fleet_parser("ramet fleet")._subparsers._group_actions
    parsers = (
        metadata_parser(),
        make_standby_parser("ramet standby"),
        make_park_parser("ramet park"),
        *commands_of_fleets.choices.values(),
    )
    of_others = {option for parser in parsers for action in parser._actions for option in action.option_strings}
    return server_flags().union(of_others, *(script_flags(path) for path in scripts))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_flags_exist(page: Path) -> None:
    named = {flag for code in inline_code(page) if code.startswith("--") for flag in flags_of(code.split())}
    assert named <= all_flags()


# ---- routes ----


@cache
def routes() -> frozenset[tuple[str, str]]:
    """Method and path of everything that instances, bootstrap servers and metadata servers answer over HTTP."""
    instance = SimpleNamespace(
        server_args=ServerArgs(model_path="m"), is_head=True, refusal=lambda: None, http_counts=None
    )
    described = create_app(instance).openapi()["paths"]
    found = {(method.upper(), path) for path, operations in described.items() for method in operations}
    fleet_app = make_fleet_app(None, None, None, FleetService().routes("127.0.0.1", None))
    found |= {(method, route.path) for route in fleet_app.routes for method in route.methods}
    standby = make_standby_router(SimpleNamespace(metrics=StandbyMetrics(None)))
    found |= {(method, route.path) for route in standby.routes for method in route.methods}
    bootstrap = Path(directory_http.__file__).read_text()
    for method, body in re.findall(r"def do_([A-Z]+)\(self\)(.*?)\n(?=    def )", bootstrap, re.DOTALL):
        found |= {(method, path) for path in re.findall(r'"(/\w+)"', body)}
    return frozenset(found)


def is_route(method: str, path: str) -> bool:
    return any(
        method == one and re.fullmatch(re.sub(r"\\{\w+(:\w+)?\\}", ".+", re.escape(pattern)), path)
        for one, pattern in routes()
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_routes_exist(page: Path) -> None:
    named = [code.split() for code in inline_code(page) if re.fullmatch(r"(GET|POST|PUT) /\S*", code)]
    assert not [(method, path) for method, path in named if not is_route(method, urlsplit(path).path)]


# ---- commands ----


def problem_of_module(name: str) -> str | None:
    module = ROOT / "python" / f"{name.replace('.', '/')}.py"
    is_started = module.is_file() and '__name__ == "__main__"' in module.read_text()
    return None if is_started else f"there is no module {name} to be started"


def problem_of(words: list[str], whole: bool) -> str | None:
    """What is wrong with a command, if anything is.

    Args:
        whole: it is meant to be typed as it is, so that its flags' values must be good ones too.
    """
    if words[:3] == ["python", "-m", "ramet"]:
        words = words[2:]
    for prefix in SERVE:
        if words[: len(prefix)] == prefix:
            return problem_of_serve(words[len(prefix) :], whole)
    for prefix in SERVE_METADATA:
        if words[: len(prefix)] == prefix:
            return problem_of_parse(metadata_parser().parse_args, words[len(prefix) :])
    name, rest = words[0], words[1:]
    if name == "ramet" and (not rest or f"\n  {rest[0]} " not in cli.USAGE):
        return "ramet has no such command"
    if name == "make":
        return problem_of_make(rest)
    if name == "curl":
        return problem_of_curl(rest)
    if name == "python" and rest[:1] == ["-m"] and rest[1].startswith("ramet"):
        return problem_of_module(rest[1])
    script = rest[0] if name in ("python", "bash") and rest else name if "/" in name else None
    if script is None or script.startswith("-"):
        return None
    if not (ROOT / script).exists():
        return f"there is no {script}"
    return problem_of_script(ROOT / script, rest) if script.endswith(".py") else None


def problem_of_parse(parse, words: list[str]) -> str | None:
    try:
        parse(words)
    except ValueError as error:
        return f"the flags can't be used: {error}"
    except SystemExit as error:
        return f"the flags can't be used: {error}" if error.code else None  # --help ends with 0
    return None


def problem_of_serve(words: list[str], whole: bool) -> str | None:
    if unknown := set(flags_of(words)) - server_flags():
        return f"unknown flags {unknown}"
    if words and not words[0].startswith("-"):
        words = ["--model-path", *words]
    return problem_of_parse(parse_server_args, words) if whole else None


def problem_of_script(script: Path, words: list[str]) -> str | None:
    unknown = set(flags_of(words)) - script_flags(script)
    return f"{script.name} has no flags {unknown}" if unknown else None


def problem_of_make(words: list[str]) -> str | None:
    targets, variables = make_words()
    given = dict(word.split("=", 1) for word in words if "=" in word)
    named = [word for word in words if "=" not in word]
    if unknown := (set(named) - targets) | (set(given) - variables):
        return f"the Makefile has no {unknown}"
    script = script_behind_make(named[0]) if named else None
    if "ARGS" in given:
        return problem_of_script(script, given["ARGS"].split()) if script else f"make {named} takes no ARGS"
    return None


def problem_of_curl(words: list[str]) -> str | None:
    method = words[words.index("-X") + 1] if "-X" in words else "POST" if "-d" in words else "GET"
    path = urlsplit(next((word for word in words if "://" in word), "")).path
    return None if is_route(method, path) else f"there is no route {method} {path}"


def test_every_block_says_its_language() -> None:
    assert not [str(block) for block in BLOCKS if block.language not in LANGUAGES]


def test_only_what_could_be_run_says_why_it_is_not() -> None:
    assert not [str(block) for block in BLOCKS if block.not_run and block.language not in ("bash", "python")]


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "bash"], ids=str)
def test_commands_in_blocks_exist(block: Block) -> None:
    problems = [(" ".join(words), problem_of(words, whole=True)) for words in commands(block.text)]
    assert not [problem for problem in problems if problem[1]]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_sentences_exist(page: Path) -> None:
    found = [
        commands(code)[0] for code in inline_code(page) if re.match(rf"(\.venv/bin/)?(({'|'.join(OURS)}) |make$)", code)
    ]
    problems = [(" ".join(words), problem_of(words, whole=False)) for words in found]
    assert not [problem for problem in problems if problem[1]]


@pytest.mark.slow  # one of them starts an instance
@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if block.language in ("bash", "python") and block.not_run is None], ids=str
)
def test_blocks_that_have_no_mark_run(block: Block) -> None:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT / "python"),
    }
    command = ["bash", "-euo", "pipefail", "-c"] if block.language == "bash" else [sys.executable, "-c"]
    text = block.text.replace(".venv/bin/", "")
    result = subprocess.run(
        [*command, text], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=RUN_TIMEOUT_S, check=False
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"


# ---- the checks themselves ----


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ("ramet serve M --tp-size 2 --pp-size 2", None),
        ("ramet serve M --tensor-size 2", "unknown flags"),
        ("ramet serve M --tp-size 0", "must be at least 1"),
        ("X=1 .venv/bin/python -m ramet.launch_server --model-path M  # with a comment", None),
        ("python -m ramet.launch", "no module"),
        ("python -m ramet serve M --tensor-size 2", "unknown flags"),
        ("ramet grow", "no such command"),
        ("ramet serve --help && ramet modelexpress-server --help", None),
        ("ramet modelexpress-server --port x", "flags can't be used"),
        ("make test MARKS= && make bench ARGS='startup --output x'", None),
        ("make tests", "has no {'tests'}"),
        ("make run MODELS=x", "has no {'MODELS'}"),
        ("make run ARGS=--no-such-flag", "has no flags"),
        ("python benchmark/no.py", "there is no benchmark/no.py"),
        ("python benchmark/simulate_fanout.py --markup", "has no flags"),
        ("curl http://h:1/generate -d '{\n}'", None),
        ("curl http://h:1/generate", "no route GET /generate"),
        ("curl -X PUT http://h:1/register_transfer_engine_info", None),
        ("curl http://h:1/v1/models/a/b | head", None),
        ("scripts/no.sh", "there is no scripts/no.sh"),
    ],
)
def test_what_is_wrong_is_found(script: str, problem: str | None) -> None:
    problems = [found for words in commands(script) if (found := problem_of(words, whole=True))]
    assert len(problems) == (problem is not None)
    assert problem is None or problem in problems[0]


def test_marks_are_read(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- not run: needs a GPU -->\n```bash\na\n```\n\n```\nb\n```\n")
    assert [(block.language, block.not_run, block.text) for block in blocks(page)] == [
        ("bash", "needs a GPU", "a"),
        ("", None, "b"),
    ]
    for text in (
        "<!-- not run: x -->\n\ntext\n",
        "<!-- not run: x -->",
        "<!-- not run: -->\n```bash\n```\n",
        "```bash\n",
    ):
        page.write_text(text)
        with pytest.raises(ValueError, match=r"page.md:1: "):
            blocks(page)
