"""Writes the lowest versions that setup.py allows, as constraints for pip: `python scripts/lowest_versions.py > FILE`.

`--without NAME` leaves a package out (torch, which is too large to be installed twice); `--extra NAME` adds the
packages of an extra. What these packages need themselves isn't listed: pip takes its newest version, and so meets the
combinations that an old environment gets when something else in it is updated.
"""

import argparse
import ast
import re
import sys
from pathlib import Path

SETUP = Path(__file__).resolve().parent.parent / "setup.py"
REQUIREMENT = re.compile(r"([A-Za-z0-9_.-]+)>=([0-9.]+)(?:\s*;.*)?")


def read_requirements(text: str) -> dict[str, list[str]]:
    """The lists of requirements in a setup.py: those of each extra, and under "" those that are always installed."""
    values = {}
    for node in ast.parse(text).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else None
        if isinstance(target, ast.Name) and target.id in ("REQUIREMENTS", "EXTRAS"):
            values[target.id] = ast.literal_eval(node.value)
    return {"": values["REQUIREMENTS"], **values["EXTRAS"]}


def lowest(requirement: str) -> tuple[str, str]:
    """A requirement's name and its lower bound.

    Raises:
        ValueError: if it isn't of the form name>=version, perhaps with a condition behind it.
    """
    match = REQUIREMENT.fullmatch(requirement)
    if match is None:
        raise ValueError(f"setup.py: {requirement!r} is not of the form name>=version")
    return match[1], match[2]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extra", action="append", default=[], metavar="NAME")
    parser.add_argument("--without", action="append", default=[], metavar="NAME")
    args = parser.parse_args()
    requirements = read_requirements(SETUP.read_text())
    for part in ("", *args.extra):
        if part not in requirements:
            parser.error(f"setup.py has no extra {part!r}; it has {', '.join(filter(None, requirements))}")
        for name, version in map(lowest, requirements[part]):
            if name not in args.without:
                sys.stdout.write(f"{name}=={version}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
