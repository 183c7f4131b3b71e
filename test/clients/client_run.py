"""Owns one run of a client's driver: started in its environment against a server, all output kept in .run/clients."""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clients.environments import DRIVERS, REPOSITORY, clean_environment, node_folder, python_of
from clients.wire_tap import WireTap
from server_process import MODEL_NAME, run_script

KEPT = REPOSITORY / ".run" / "clients"


class StepFailed(AssertionError):
    """A step of a driver raised; the message is the client's."""


@dataclass(frozen=True)
class ClientRun:
    """What a driver has seen, step by step."""

    name: str
    lines: dict[str, dict[str, Any]]

    def saw(self, step: str) -> Any:
        """What the step gave back.

        Raises:
            StepFailed: if it has raised, or never ended.
        """
        line = self.lines.get(step, {"error": "the driver has not told of it"})
        if "error" in line:
            raise StepFailed(f"{self.name}, {step}: {line['error']}")
        return line["saw"]


def kept_file(name: str) -> Path:
    """Where a client's output is kept."""
    KEPT.mkdir(parents=True, exist_ok=True)
    return KEPT / name


def run_driver(driver: str, group: str, url: str, *, timeout_s: float = 240, **environment: str) -> ClientRun:
    """Run `drivers/DRIVER` in the environment `group`; what passes over the wire is kept, too.

    Args:
        environment: more variables.

    Raises:
        EnvironmentFailed: if the environment can't be made.
        subprocess.TimeoutExpired: if the driver takes longer.
    """
    name = Path(driver).stem
    if driver.endswith(".mjs"):
        node, drivers = node_folder()
        command = [node, drivers / driver]
    else:
        command = [python_of(group), DRIVERS / driver]
    tap = WireTap(url, kept_file(f"{name}.wire.jsonl"))
    try:
        result = run_program([*command, tap.url, MODEL_NAME], name, timeout_s, **environment)
    finally:
        tap.close()
    kept_file(f"{name}.jsonl").write_text(result.stdout)
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith('{"step"')]
    return ClientRun(name, {line["step"]: line for line in lines})


def run_program(
    command: list[Any], name: str, timeout_s: float, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a program that is not Ramet's, and keep what it prints in NAME.log."""
    result = run_script(command, timeout_s, {**clean_environment(), **environment})
    shown = " ".join(str(part) for part in command)
    kept_file(f"{name}.log").write_text(f"$ {shown}\n{result.stdout}\n{result.stderr}\nstatus {result.returncode}\n")
    return result
