"""Before a commit, in continuous integration and by hand the same is checked: what `make lint` runs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = {
    ".pre-commit-config.yaml": r"^\s+entry: (.+)$",
    ".github/workflows/ci.yml": r"^\s+- run: (.+)$",
    ".ci/run": r"^(make .+)$",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_make_lint_is_what_is_run(name: str) -> None:
    found = re.findall(COMMANDS[name], (ROOT / name).read_text(), re.MULTILINE)
    assert "make lint" in found
    assert not [command for command in found if "ruff" in command or "mypy" in command]


def test_it_looks_at_format_rules_and_types() -> None:
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert lint is not None
    assert lint[1].split("\n")[:-1] == [
        "\t$(BIN)/ruff format --check .",
        "\t$(BIN)/ruff check .",
        "\t$(BIN)/mypy",
    ]
