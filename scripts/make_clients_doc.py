"""Writes the table in docs/clients.md anew from what the last runs of `make test-clients` have kept in .run/clients."""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "clients.md"
RESULTS = ROOT / ".run" / "clients" / "results.json"
BEGIN, END = "<!-- the table begins -->\n", "<!-- the table ends -->\n"

sys.path.insert(0, str(ROOT / "test"))
from clients.catalog import CLIENTS  # noqa: E402  # from the folder of the tests


def what_works(steps: dict[str, str]) -> str:
    """In words: how many of the steps passed, and which did not."""
    failed = [step for step, outcome in steps.items() if outcome != "passed"]
    if not steps:
        return "not run"
    if not failed:
        return f"all of {len(steps)}"
    return f"{len(steps) - len(failed)} of {len(steps)}; not: {'; '.join(failed)}"


def table(results: dict[str, dict[str, str]]) -> str:
    rows = ["| client | version | what is run | what works |", "|---|---|---|---|"]
    for name, client in CLIENTS.items():
        rows.append(f"| {client.title} | {client.version} | {client.what} | {what_works(results.get(name, {}))} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    before, rest = PAGE.read_text().split(BEGIN)
    _, after = rest.split(END)
    PAGE.write_text(before + BEGIN + table(json.loads(RESULTS.read_text())) + END + after)


if __name__ == "__main__":
    main()
