"""The documentation says what the code says, and its links lead somewhere."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_flags_page_is_current() -> None:
    spec = importlib.util.spec_from_file_location("make_flags_doc", ROOT / "scripts" / "make_flags_doc.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PATH.read_text() == module.render(), "run `make docs`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_files_exist(page: Path) -> None:
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    missing = [link for link in links if not (page.parent / link).exists()]
    package = ROOT / "python" / "ramet" / "srt"
    named = re.findall(r"`((?:[a-z_]+/)+[a-z_]+\.(?:py|sh|md))", text)
    missing += [
        name for name in named if not any((base / name).exists() for base in (ROOT, package, package / "model_loader"))
    ]
    assert not missing
