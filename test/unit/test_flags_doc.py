"""docs/flags.md says what the code says."""

import importlib.util
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "make_flags_doc.py"


def test_flags_page_is_current() -> None:
    spec = importlib.util.spec_from_file_location("make_flags_doc", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PATH.read_text() == module.render(), "run `make docs`"
