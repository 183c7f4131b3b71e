"""grpc, protobuf and redis are needed for ModelExpress alone."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[3] / "python" / "ramet"
OPTIONAL = {"grpc", "google", "redis"}


def imported_names(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").split(".")[0])
    return names


def test_nothing_else_imports_them() -> None:
    own = PACKAGE / "srt" / "modelexpress"
    others = [path for path in PACKAGE.rglob("*.py") if own not in path.parents]
    assert len(others) > 50
    assert [path for path in others if imported_names(path) & OPTIONAL] == []


def test_settings_need_none_of_them() -> None:
    """So that a bad --modelexpress-config is reported as such where they are not installed."""
    assert not imported_names(PACKAGE / "srt" / "modelexpress" / "settings.py") & OPTIONAL
