"""Owns how a driver runs and tells: its steps one by one, each with what it saw as one line of JSON.

A driver runs in its client's environment as `python DRIVER.py URL MODEL`. A step that fails says how and the next one
goes on, so that one run shows everything.
"""

import asyncio
import inspect
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

FLOW: dict[str, Any] = json.loads((Path(__file__).resolve().parents[1] / "flow.json").read_text())
URL, MODEL = sys.argv[1], sys.argv[2]
ONLY = set(sys.argv[3:])
_STEPS: list[Callable[[], Any]] = []


def step(function: Callable[[], Any]) -> Callable[[], Any]:
    """Make the function a step under its name; what it gives back (JSON) is what it saw."""
    _STEPS.append(function)
    return function


def run() -> None:
    """Run all steps, or those that the command line names after URL and MODEL."""
    for function in _STEPS:
        if ONLY and function.__name__ not in ONLY:
            continue
        line: dict[str, Any] = {"step": function.__name__, "begun": time.time()}
        try:
            saw = asyncio.run(function()) if inspect.iscoroutinefunction(function) else function()
            line["saw"] = saw
        except Exception as error:  # noqa: BLE001  # whatever a client raises is told
            traceback.print_exc()
            line["error"] = f"{type(error).__name__}: {error}"
        line["ended"] = time.time()
        print(json.dumps(line, default=str), flush=True)
