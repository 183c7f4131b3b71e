"""How many files and calls one load of weights goes through, by a seed's address and through a metadata server.

    python benchmark/trace_load.py [--source PYTHON_FOLDER] [--local-mode auto] [--list]

A seed and a metadata server are started as processes; what a rank builds is built here, and loaded twice: the second
load is counted, when everything has been imported. Counted are the load's thread and those that it starts.

- files: of the package, in which a function was called
- calls: of functions in them
- returns: a function ended and control went on in another file of the package; what lies between, as a thread pool of
  Python's, is left out
- ways: pairs of files between which there was such a return

With --source the package is another checkout's, for example one from before a change; its tests' folder must be beside.
"""
# ruff: noqa: E402 - the package and the tests' helpers come from the folder that is asked for

import argparse
import functools
import inspect
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

from bench_common import ROOT, running, running_metadata_server

NAME = "traced"
FLAG = "--remote-instance-weight-loader-"


class Trace:
    """Counts what happens in the files of a folder, in this thread and in those that are started meanwhile."""

    def __init__(self, folder: Path) -> None:
        self._folder = f"{folder}{os.sep}"
        self._local = threading.local()
        self._lock = threading.Lock()
        self.calls: Counter[str] = Counter()  # by file
        self.returns: Counter[tuple[str, str]] = Counter()  # by the file that has ended and the one that goes on

    def __enter__(self) -> "Trace":
        threading.setprofile(self._note)
        sys.setprofile(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)

    def _note(self, frame: FrameType, event: str, _argument: Any) -> None:
        file = frame.f_code.co_filename
        if event not in ("call", "return") or not file.startswith(self._folder):
            return
        stack: list[str] = self._local.__dict__.setdefault("stack", [])
        if event == "call":
            stack.append(file)
            with self._lock:
                self.calls[file] += 1
        elif stack:  # a function may have begun before the trace
            stack.pop()
            if stack and stack[-1] != file:
                with self._lock:
                    self.returns[file, stack[-1]] += 1

    def row(self) -> tuple[int, int, int, int]:
        return len(self.calls), self.calls.total(), self.returns.total(), len(self.returns)

    def short(self, file: str) -> str:
        return file.removeprefix(self._folder)


class Rank:
    """What a starting instance's only rank builds and knows before its weights come, on an older package too."""

    def __init__(self, model: Path, flags: list[str]) -> None:
        import sharded_models as sm
        import torch
        from ramet.srt.command_line import parse_server_args
        from ramet.srt.configs.load_config import LoadConfig

        config = sm.ModelConfig.from_path(str(model))
        built = sm.DecoderForCausalLM(config, getattr(torch, config.dtype), sm.ranks_of()[0])
        built.prepare(torch.device("cpu"))
        self.manifest = sm.build_weight_manifest(
            built.named_parameters(remove_duplicate=False),
            model_name=NAME,
            revision=config.revision,
            dtype=config.dtype,
            quantization=config.quantization,
            role="target",
            parallel=built.parallel,
            dimensions=config.dimensions,
        )
        args = parse_server_args(["--model-path", str(model), "--served-model-name", NAME, *flags])
        names = {"dtype": config.dtype, "quantization": config.quantization}
        is_old = hasattr(LoadConfig, "from_server_args")
        self.config = LoadConfig.from_server_args(args, **names) if is_old else args.load_config(**names)
        self._model = model
        self._allocate = getattr(sm, "allocate_arena", None) or sm.WeightArena.allocate

    def load(self, folder: Path) -> Trace:
        """Load into a new arena, by a new loader, and count."""
        loader = self._make_loader()
        arena = self._allocate(self.manifest, "cpu")
        with Trace(folder) as trace:
            result = loader.load_weights(self.manifest, arena, str(self._model))
        report = getattr(result, "report", result)
        if report.fallback_reason or not report.taken_from:
            raise RuntimeError(f"the weights came from {report.source}, not from the seed: {report.fallback_reason}")
        return trace

    def _make_loader(self) -> Any:
        from ramet.srt.configs.load_config import LoadContext
        from ramet.srt.model_loader.loader import get_model_loader

        context = LoadContext(started_at=time.time())
        if "context" in inspect.signature(get_model_loader).parameters:
            return get_model_loader(self.config, context)
        if self.config.modelexpress_url is None:
            return get_model_loader(self.config)
        from ramet.srt.modelexpress.client.seed_search import make_seed_search

        return get_model_loader(self.config, functools.partial(make_seed_search, self.config, context))


def use_package(source: Path) -> Path:
    """Import the package, here and in child processes, from `source`. Returns the package's folder."""
    package = source / "ramet"
    if not package.is_dir():
        raise SystemExit(f"error: --source must be a folder with the package ramet in it; got {source}")
    os.environ["PYTHONPATH"] = str(source)
    sys.path[:0] = [str(source), str(source.parent / "test")]
    return package


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=ROOT / "python", help="folder that holds the package")
    parser.add_argument("--local-mode", default="auto", help="how weights come from the same host")
    parser.add_argument("--list", action="store_true", help="say which files, too")
    arguments = parser.parse_args()
    package = use_package(arguments.source.resolve())
    from random_models import make_model

    with tempfile.TemporaryDirectory(prefix="ramet-trace-") as text:
        folder = Path(text)
        model = make_model(folder / "model", "qwen2")
        with running_metadata_server(folder) as metadata:
            express = f'{{"url": "{metadata.address}"'
            seed_flags = ["--modelexpress-config", f'{express}, "source": true}}', "--served-model-name", NAME]
            with running(model, *seed_flags) as seed:
                client = ["--load-format", "remote_instance", f"{FLAG}fallback", "error"]
                client += [f"{FLAG}local-mode", arguments.local_mode]
                ways = {
                    "by address": [f"{FLAG}seed-instance-ip", f"127.0.0.1:{seed.port}"],
                    "ModelExpress": [f"{FLAG}backend", "modelexpress", "--modelexpress-config", f"{express}}}"],
                }
                print(f"{'':14}{'files':>7}{'calls':>7}{'returns':>9}{'ways':>6}")
                for name, flags in ways.items():
                    rank = Rank(model, [*client, *flags])
                    rank.load(package)  # imports what this way needs
                    trace = rank.load(package)
                    print("{:14}{:7}{:7}{:9}{:6}".format(name, *trace.row()))
                    if arguments.list:
                        print(*(f"  {count:5} calls in {trace.short(file)}" for file, count in
                                sorted(trace.calls.items())), sep="\n")  # fmt: skip


if __name__ == "__main__":
    main()
