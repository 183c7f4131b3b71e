"""A signal that comes while a server's modules are still being imported ends it as a later one does."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from server_process import PYTHON_FOLDER, TEST_FOLDER, write_weightless_model

# The import of a module is where the signal comes.
IMPORT_HOOK = """
import runpy, signal, sys

class Finder:
    def find_spec(self, name, *rest):
        if name == {module!r}:
            {what}

sys.meta_path.insert(0, Finder())
"""


def run(tmp_path: Path, module: str, what: str, then: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    code = IMPORT_HOOK.format(module=module, what=what) + then
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=20,
        env={"PYTHONPATH": f"{PYTHON_FOLDER}:{TEST_FOLDER}", "PATH": "/usr/bin:/bin", "TMPDIR": str(tmp_path)},
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("command", [("serve", "a-model"), ("modelexpress-server",)])
def test_without_a_word(tmp_path: Path, command: tuple[str, ...], number: int) -> None:
    then = "from ramet.cli import main; sys.exit(main())"
    result = run(tmp_path, "ramet.srt.cli_parser", f"signal.raise_signal({int(number)})", then, *command)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize("module", ["ramet.srt.entrypoints.http_server", "uvloop"])
def test_even_where_exceptions_are_dropped(tmp_path: Path, module: str) -> None:
    what = """try:
                signal.raise_signal(signal.SIGINT)
            except BaseException:
                pass"""
    then = f"runpy.run_path({str(TEST_FOLDER / 'launch_with_fake_scheduler.py')!r}, run_name='__main__')"
    model = write_weightless_model(tmp_path / "model")
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    result = run(temporary, module, what, then, "--model-path", str(model), "--port", "0")
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    assert not list(temporary.iterdir())
