"""Writes docs/flags.md from ServerArgs; test/unit/test_docs.py checks that it is current."""

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "python"))

from ramet.srt.server_args import ServerArgs  # noqa: E402 - its folder is made importable above
from ramet.srt.server_flags import flag_name  # noqa: E402 - its folder is made importable above

PATH = ROOT / "docs" / "flags.md"
HEAD = """# Flags

The flags of `ramet serve` and `python -m ramet.launch_server`, which are also the keyword arguments of `ramet.Engine`
(`--model-path` is `model_path`). Names follow SGLang's. Abbreviations are not accepted, an unknown flag is an error.

`make docs` writes this page from `python/ramet/srt/server_flags.py`.
"""


def section_of_fields() -> dict[str, str]:
    """Field name -> the comment line above its group in the source of ServerArgs."""
    source = (ROOT / "python/ramet/srt/server_flags.py").read_text().split("class ServerFlags", 1)[1]
    sections, current = {}, ""
    for line in source.splitlines():
        if comment := re.fullmatch(r"    # (\w[\w ]*)", line):
            current = comment.group(1)
        elif field := re.match(r"    (\w+): .*= flag\(", line):
            sections[field.group(1)] = current
        elif line.startswith("    def "):
            break
    return sections


def describe(field: dataclasses.Field, hint: Any) -> str:
    """One row of the table: flag, values, default, help."""
    types = [t for t in (*get_args(hint), hint) if t in (int, float, str, bool)]
    choices = field.metadata["choices"]
    values = ", ".join(f"`{choice}`" for choice in choices) if choices else types[0].__name__
    default = f"`{field.default}`"
    if hint is bool:
        values, default = "", ""
    elif field.default is dataclasses.MISSING:
        default = "required"
    elif field.default in (None, ()):
        default = ""
    return (
        f"| `{flag_name(field.name)}` | {values} | {default} | {field.metadata['help'].replace('|', chr(92) + '|')} |"
    )


def render() -> str:
    """The whole page."""
    hints, sections = get_type_hints(ServerArgs), section_of_fields()
    lines, current = [HEAD], None
    for field in dataclasses.fields(ServerArgs):
        if sections[field.name] != current:
            current = sections[field.name]
            lines.append(f"\n## {current}\n\n| flag | values | default | meaning |\n|---|---|---|---|")
        lines.append(describe(field, hints[field.name]))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PATH.write_text(render())
