"""Writes the tables of foreign fields in docs/http.md from the code; test/unit/test_docs.py checks their state."""

import json
import sys
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "python"))

from ramet.srt.entrypoints.http.accepted_fields import TABLES, ForeignField, Table  # noqa: E402 - made importable above

PATH = ROOT / "docs" / "http.md"
BEGIN = "<!-- written by `make docs` from python/ramet/srt/entrypoints/http/accepted_fields.py -->\n"
END = "<!-- up to here -->\n"


def values_of(field: ForeignField) -> str:
    """What stands in the last column."""
    if field.is_free:
        return "anything"
    texts = dict.fromkeys(json.dumps(value) for value in field.values or ())
    return ", ".join(["empty", *(f"`{text}`" for text in texts)])


def table(fields: Table) -> str:
    """One table: fields that have everything in common but their name share a row."""
    lines = ["| field | of | what it is about | taken |", "|---|---|---|---|"]
    for (by, about, values), group in groupby(fields.values(), lambda one: (one.by, one.about, values_of(one))):
        names = ", ".join(f"`{field.name}`" for field in group)
        lines.append(f"| {names} | {by} | {about} | {values} |")
    return "\n".join(lines) + "\n"


def render() -> str:
    """The whole page, with new tables in the place of the old ones."""
    page = PATH.read_text()
    before, rest = page.split(BEGIN)
    tables = "\n".join(f"{title}:\n\n{table(fields)}" for title, fields in TABLES.items())
    return f"{before}{BEGIN}\n{tables}\n{END}{rest.split(END, 1)[1]}"


if __name__ == "__main__":
    PATH.write_text(render())
