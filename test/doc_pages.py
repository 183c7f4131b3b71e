"""Reads the documentation for its tests: code blocks, the commands in them, and what those may name.

A block says its language. One of shell commands or Python is run by the tests, unless the line above it says why not:
`<!-- not run: needs a GPU -->`.
"""

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
MARK = re.compile(r"<!-- not run: (\S.*) -->")
OPERATORS = frozenset({"&&", "||", "|", ";", "&"})


@dataclass(frozen=True)
class Block:
    """A fenced code block."""

    page: str
    line: int  # of its fence, from 1
    language: str
    text: str
    not_run: str | None  # why, as its mark says it

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """The code blocks of a page.

    Raises:
        ValueError: for a fence that is never closed, and for a mark with no block below it.
    """
    found, opened = [], 0
    lines = page.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        is_fence, next_is_fence = line.startswith("```"), "".join(lines[number : number + 1]).startswith("```")
        if is_fence and not opened:
            opened = number
        elif is_fence:
            mark = MARK.fullmatch(lines[opened - 2]) if opened > 1 else None
            text = "\n".join(lines[opened : number - 1])
            found.append(Block(page.name, opened, lines[opened - 1][3:], text, mark and mark[1]))
            opened = 0
        elif not opened and line.startswith("<!-- not run") and not (MARK.fullmatch(line) and next_is_fence):
            raise ValueError(f"{page.name}:{number}: this mark has no block below it, or gives no reason")
    if opened:
        raise ValueError(f"{page.name}:{opened}: this block has no end")
    return found


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def inline_code(page: Path) -> list[str]:
    """What stands between backquotes in a page's text."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(page))]


def commands(script: str) -> list[list[str]]:
    """The words of each command in a piece of shell: without comments, variables before a command, and .venv/bin.

    Raises:
        ValueError: if a quotation has no end.
    """
    lines, pending = [], ""
    for line in script.replace("\\\n", " ").splitlines():
        pending += line
        try:
            lines.append(shlex.split(pending, comments=True))
            pending = ""
        except ValueError:
            pending += "\n"  # a quotation goes on
    if pending:
        raise ValueError(f"a quotation has no end: {pending}")
    return [command for line in lines for command in _split_at_operators(line) if command]


def _split_at_operators(words: list[str]) -> Iterator[list[str]]:
    command: list[str] = []
    for word in [*words, ";"]:
        if word not in OPERATORS:
            command.append(word)
            continue
        while command and re.fullmatch(r"[A-Z_]+=.*", command[0], re.DOTALL):
            command = command[1:]
        yield [command[0].removeprefix(".venv/bin/"), *command[1:]] if command else []
        command = []


def flags_of(words: list[str]) -> list[str]:
    """The flags among a command's words, up to a bare --."""
    end = words.index("--") if "--" in words else len(words)
    return [word.partition("=")[0] for word in words[:end] if re.match(r"--[a-z]", word)]


@cache
def script_flags(path: Path) -> frozenset[str]:
    """The flags of a Python script of ours, and of those beside it that it imports from."""
    flags = {"--help"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
            names = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
            flags |= {name for name in names if str(name).startswith("--")}
        elif isinstance(node, ast.ImportFrom) and (path.parent / f"{node.module}.py").exists():
            flags |= script_flags(path.parent / f"{node.module}.py")
    return frozenset(flags)


@cache
def make_words() -> tuple[frozenset[str], frozenset[str]]:
    """The targets and the variables of the Makefile."""
    text = (ROOT / "Makefile").read_text()
    return (
        frozenset(re.findall(r"^([a-z-]+):.*## ", text, re.MULTILINE)),
        frozenset(re.findall(r"^([A-Z]+) \?=", text, re.MULTILINE)),
    )


@cache
def script_behind_make(target: str) -> Path | None:
    """The Python script that a target of the Makefile gives $(ARGS) to."""
    text = (ROOT / "Makefile").read_text()
    match = re.search(rf"^{target}:.*\n\t@?\$\(BIN\)/python (\S+) .*\$\(ARGS\)", text, re.MULTILINE)
    return match and ROOT / match[1]
