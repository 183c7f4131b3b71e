"""Building the kernels for CPUs: once, by whoever comes first, beside serving; and what is said where it can't be."""

import os
import stat
import subprocess
import sys
import threading
import time

import pytest
from ramet.srt.layers.cpu_kernels import build, library

TIMEOUT_S = 60


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RAMET_CPU_KERNELS_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(library, "_library", None)
    monkeypatch.setattr(library, "_begun", False)
    return tmp_path / "cache"


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """A compiler that counts its calls, and makes what the `answer` file says."""
    script = tmp_path / "compiler"
    script.write_text(
        f'#!{sys.executable}\nimport sys, time, pathlib\nfolder = pathlib.Path("{tmp_path}")\n'
        'with (folder / "calls").open("a") as file: file.write(sys.argv[-1] + "\\n")\n'
        'time.sleep(0.2)\nif (folder / "fails").exists(): sys.exit("no such processor\\nfatal: nothing is made")\n'
        'pathlib.Path(sys.argv[sys.argv.index("-o") + 1]).write_bytes(b"made")\n'
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(script))
    return tmp_path


def wait_for_build():
    for thread in threading.enumerate():
        if thread.name == "build-cpu-kernels":
            thread.join(TIMEOUT_S)
            assert not thread.is_alive()


def test_several_processes_build_once(compiler, cache):
    command = [sys.executable, "-m", "ramet.srt.layers.cpu_kernels.build"]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    printed = {process.communicate(timeout=TIMEOUT_S)[0].strip() for process in processes}
    assert printed == {str(build.library_path())} and build.library_path().read_bytes() == b"made"
    sources = list(build.SOURCES.glob("*.cpp"))
    assert len((compiler / "calls").read_text().splitlines()) == len(sources) + 1
    assert {path.suffix for path in cache.iterdir()} == {".so", ".lock"}, "nothing is left of the building"


def test_another_processor_or_other_sources_are_another_library(monkeypatch, tmp_path):
    path = build.library_path()
    monkeypatch.setattr(build, "processor", lambda: "another one")
    assert build.library_path() != path
    monkeypatch.undo()
    monkeypatch.setenv("RAMET_CPU_KERNELS_DIR", str(path.parent))
    (tmp_path / "native").mkdir()
    for source in build.SOURCES.iterdir():
        (tmp_path / "native" / source.name).write_bytes(source.read_bytes())
    monkeypatch.setattr(build, "SOURCES", tmp_path / "native")
    assert build.library_path() == path
    with (tmp_path / "native" / "tiles.h").open("a") as file:
        file.write("\n")
    assert build.library_path() != path


def test_what_does_not_compile_is_said_and_pytorch_computes(compiler, cache, caplog):
    (compiler / "fails").touch()
    library.prepare(1)
    wait_for_build()
    assert library.library() is None
    assert "CPU kernels are not built; PyTorch's own operations compute" in caplog.text
    assert "no such processor | fatal: nothing is made" in caplog.text
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_what_is_no_library_is_said(compiler, caplog):
    build.build()
    library.prepare(1)
    assert library.library() is None and "CPU kernels can't be loaded" in caplog.text


def test_without_a_compiler_pytorch_computes(monkeypatch, caplog):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    library.prepare(1)
    assert library.library() is None and "no C++ compiler is installed" in caplog.text
    with pytest.raises(build.NoCompilerError, match=r"\$CXX nor c\+\+"):
        build.build()


def test_a_cache_that_can_not_be_written_is_said(compiler, cache, caplog):
    cache.write_text("a file")
    library.prepare(1)
    wait_for_build()
    assert library.library() is None and "CPU kernels are not built" in caplog.text


def test_they_can_be_turned_off(monkeypatch):
    monkeypatch.setenv("RAMET_CPU_KERNELS", "0")
    library.prepare(1)
    assert library.library() is None and not library._begun


def test_a_process_without_the_library_serves_until_it_is_built(caplog):
    if build.find_compiler() is None:
        pytest.skip("there is no C++ compiler")
    caplog.set_level("INFO", logger="ramet")
    library.prepare(2)
    assert library.library() is None, "nothing waits for the compiler"
    wait_for_build()
    assert library.library() is not None and "CPU kernels: vectors of" in caplog.text
    assert os.access(build.library_path(), os.R_OK)


def test_who_does_not_build_waits_for_who_does(compiler, cache):
    first = subprocess.Popen([sys.executable, "-m", "ramet.srt.layers.cpu_kernels.build"], stdout=subprocess.DEVNULL)
    while not list(cache.glob("building-*")):
        assert first.poll() is None
    with pytest.raises(BlockingIOError):
        build.build(waits=False)
    assert build.build().read_bytes() == b"made" and first.wait(TIMEOUT_S) == 0


def test_a_build_goes_on_though_who_wanted_it_has_ended(compiler):
    script = "from ramet.srt.layers.cpu_kernels import library; library.prepare(1); import time; time.sleep(1)"
    subprocess.run([sys.executable, "-c", script], timeout=TIMEOUT_S, check=True)
    deadline = time.monotonic() + TIMEOUT_S
    while not build.library_path().is_file():
        assert time.monotonic() < deadline
        time.sleep(0.1)
