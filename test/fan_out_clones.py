"""Owns clones as processes of their own that take a toy model's weights from a seed, and from each other meanwhile.

Run as a script it is one clone: it takes the weights as an instance does that starts, says how, and gives until its
stdin ends. It imports no torch.
"""

import contextlib
import json
import subprocess
import sys
import time
from typing import Any, Self

import seed_process
from ramet.srt.configs.load_config import LoadConfig
from ramet.srt.configs.runner_config import REQUIRED
from ramet.srt.model_loader.arena.allocate import allocate_arena
from ramet.srt.model_loader.client import fan_out
from ramet.srt.model_loader.loader import get_model_loader
from ramet.srt.model_loader.seed.weight_seed import WeightSeed, open_doors
from ramet.srt.utils.net import SeedAddress

CLONE_DEFAULTS: dict[str, Any] = {
    "host": "127.0.0.1",
    "seeds": [],  # host and port of each
    "local_mode": "off",
    "timeout_s": 20.0,
    "bytes_per_s": 0,  # from each of those it takes from; 0: as fast as it can
    "gives": True,
    "waits": False,  # for a line from stdin, before it begins
    "lies": False,  # change a piece once it was checked
}


def take(config: dict[str, Any]) -> None:
    """Be a clone until stdin ends. Prints a line for each piece that comes, and one at the end."""
    manifest = seed_process.make_manifest(config["model"])
    arena = allocate_arena(manifest, "cpu")
    load_config = LoadConfig(
        load_format="remote_instance",
        seeds=tuple(SeedAddress(host, port) for host, port in config["seeds"]),
        host=config["host"],
        local_mode=config["local_mode"],
        timeout_s=config["timeout_s"],
        fallback="error",
    )
    _tell_pieces(config["bytes_per_s"], lies=config["lies"])

    def opener(arena: Any, hub: Any) -> Any:
        return open_doors(arena, config["host"], REQUIRED, hub)

    loader = get_model_loader(load_config, open_doors=opener if config["gives"] else None)
    if config["waits"]:
        say("prepared")
        sys.stdin.readline()
    say("begun", at=time.time())
    try:
        report = loader.load_weights(manifest, arena, "/nonexistent").report
    except RuntimeError as error:
        say("failed", at=time.time(), reason=str(error))
        return
    is_right = seed_process.holds(arena, seed_process.make_tensors(config["model"]))
    seed = WeightSeed.start(manifest, arena, host=config["host"]) if config["gives"] else None
    say(
        "done",
        at=time.time(),
        seconds=report.seconds,
        source=report.source,
        is_right=is_right,
        is_verified=report.verified,
        taken=dict(zip(report.taken_from, report.taken_bytes, strict=True)),
        link=seed.registration.link.port if seed is not None and seed.registration.link is not None else 0,
    )
    sys.stdin.read()
    if seed is not None:
        say("ended", given=seed.num_given_bytes)
        seed.close()


def say(what: str, **facts: Any) -> None:
    sys.stdout.write(json.dumps({"what": what, **facts}) + "\n")
    sys.stdout.flush()


def _tell_pieces(bytes_per_s: int, *, lies: bool) -> None:
    """Say when a piece has come, and when one that gives is given up.

    A piece lasts as on a link of that rate, one for each of those that give.
    """
    settle, take_one, drop = fan_out.FanOut._settle, fan_out.FanOut._take, fan_out.FanOut._drop

    def told_settle(self: Any, source: Any, piece: int, error: Any, *args: Any, **kwargs: Any) -> None:
        if lies and error is None and not kwargs:
            self._arena.memory[self._pieces[piece].start] ^= 1
        settle(self, source, piece, error, *args, **kwargs)
        if error is None and not kwargs:
            say("piece", at=time.time(), number=piece, giver=source.rank.seed)

    def slow_take(self: Any, source: Any, piece: int, *args: Any) -> None:
        if bytes_per_s:
            time.sleep(self._pieces[piece].nbytes / bytes_per_s)
        take_one(self, source, piece, *args)

    def told_drop(self: Any, source: Any, error: Any) -> None:
        if source.is_alive and not self._is_over:
            say("dropped", at=time.time(), giver=source.rank.seed, reason=str(error))
        drop(self, source, error)

    fan_out.FanOut._settle, fan_out.FanOut._take = told_settle, slow_take  # type: ignore[method-assign]
    fan_out.FanOut._drop = told_drop  # type: ignore[method-assign]


class CloneProcess:
    """A clone that has been started. Use as a context manager."""

    def __init__(self, model: dict[str, Any], seeds: list[tuple[str, int]], *prefix: str, **config: Any) -> None:
        whole = CLONE_DEFAULTS | config | {"model": seed_process.DEFAULTS | model, "seeds": seeds}
        self.process = subprocess.Popen(
            [*prefix, sys.executable, __file__, json.dumps(whole)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pieces: list[dict[str, Any]] = []
        self.dropped: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def read(self, *wanted: str) -> dict[str, Any]:
        """What it says next of these; its pieces are kept."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            said = json.loads(line)
            if said["what"] == "piece":
                self.pieces.append(said)
            if said["what"] == "dropped":
                self.dropped.append(said)
            if said["what"] in wanted:
                return said
        raise AssertionError(f"the clone ended with {self.process.wait(30)}")

    def begin(self) -> None:
        """One that waits: now."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def end(self) -> dict[str, Any]:
        """Let it end; what it says then."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.read("ended")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(30)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


if __name__ == "__main__":
    take(json.loads(sys.argv[1]))
