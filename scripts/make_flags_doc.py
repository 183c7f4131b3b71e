"""Writes docs/flags.md from ServerArgs; test/unit/test_docs.py checks that it is current."""

import dataclasses
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "python"))

from ramet.srt.flags.flag import flag_name  # noqa: E402 - its folder is made importable above
from ramet.srt.server_args import ServerArgs  # noqa: E402
from ramet.srt.server_flags import NEEDLESS, sectioned_fields  # noqa: E402

PATH = ROOT / "docs" / "flags.md"
HEAD = """# Flags

The flags of `ramet serve` and `python -m ramet.launch_server`, which are also the keyword arguments of `ramet.Engine`
(`--model-path` is `model_path`). Names follow SGLang's. Abbreviations are not accepted, an unknown flag is an error.
The model may stand alone: `ramet serve MODEL`.

`--config FILE` reads flags from a YAML file; those of the command line go before it. Keys are flags without their
dashes at the front, `-` and `_` are the same inside, other spellings count, too. A switch is `true` or `false`, `null`
is as good as no line, a list is several values where a flag takes them, an object is JSON. Values stay as they are
written: `1.10` is no number where a name is expected. An unknown key, and one that is there twice, is an error:

```text
model: org/name
tp-size: 2
served-model-name: [name, name-latest]
log-requests: true
modelexpress-config: {url: "10.0.0.9:8001"}
```

`--from-standby` has a standby of this host become the model, if there is one
([standby.md](standby.md#serve-by-a-standby)).

`make docs` writes this page from `python/ramet/srt/flags`.
"""
TAIL = """
## Without an effect

Flags of other servers for what is always so here. Each is taken with a line of the log.

| flag | why |
|---|---|
"""


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
    elif field.default in (None, (), ""):
        default = ""
    names = ", ".join(f"`{name}`" for name in (flag_name(field.name), *field.metadata["aliases"]))
    return f"| {names} | {values} | {default} | {field.metadata['help'].replace('|', chr(92) + '|')} |"


def render() -> str:
    """The whole page."""
    hints, lines = get_type_hints(ServerArgs), [HEAD]
    for section, fields in sectioned_fields():
        lines.append(f"\n## {section}\n\n| flag | values | default | meaning |\n|---|---|---|---|")
        lines += [describe(field, hints[field.name]) for field in fields]
    needless = "".join(f"| `{name}` | {reason} |\n" for name, reason in NEEDLESS.items())
    return "\n".join(lines) + "\n" + TAIL + needless


if __name__ == "__main__":
    PATH.write_text(render())
