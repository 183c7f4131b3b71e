"""Runs every benchmark, one after the other, and writes .run/bench/results.md with command, machine and date.

python benchmark/run_all.py [NAME …]    names: weights, transfers, registration, seed_latency, startup, decode, serving,
                                        modelexpress, discovery, replicas, standby, parsers; all when none is given
"""

import argparse
import json
import subprocess
import sys

from bench_common import RESULTS, ROOT

NAMES = (
    "weights",
    "transfers",
    "registration",
    "seed_latency",
    "startup",
    "decode",
    "serving",
    "modelexpress",
    "discovery",
    "replicas",
    "standby",
    "parsers",
)


def to_markdown(result: dict) -> str:
    """One benchmark's section of the page."""
    machine = result["machine"]
    where = f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB"
    versions = ", ".join(f"{key} {machine[key]}" for key in ("python", "torch", "transformers") if key in machine)
    rows = "\n".join(f"| {label} | {text} |" for label, text in result["rows"])
    return (
        f"## {result['name']}\n\n`{result['command']}`, {result['date']}, {where}; {versions}\n\n"
        f"| measured | |\n|---|---|\n{rows}\n"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=", ".join(NAMES))
    names = parser.parse_args().names or NAMES
    if unknown := [name for name in names if name not in NAMES]:
        parser.error(f"unknown benchmark {unknown[0]}; known are {', '.join(NAMES)}")
    failed, sections = [], []
    for name in names:
        output = RESULTS / f"{name}.json"
        output.unlink(missing_ok=True)
        command = [sys.executable, str(ROOT / "benchmark" / f"bench_{name}.py"), "--output", str(output)]
        if subprocess.run(command, cwd=ROOT).returncode != 0:
            failed.append(name)
        if output.exists():
            sections.append(to_markdown(json.loads(output.read_text())))
    if sections:
        (RESULTS / "results.md").write_text("\n".join(sections))
        print(f"\nwritten: {RESULTS / 'results.md'}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
