"""Owns how command lines are read: bad input gets one line, which names what may have been meant."""

import argparse
import difflib
from collections.abc import Iterable
from typing import Any


class JoinAction(argparse.Action):
    """Joins the values of a flag that is given several times with commas."""

    def __call__(self, _parser: Any, namespace: Any, value: Any, _option_string: str | None = None) -> None:
        before = getattr(namespace, self.dest, None)
        setattr(namespace, self.dest, value if before is None else f"{before},{value}")


class CliParser(argparse.ArgumentParser):
    """An ArgumentParser that answers bad input with one line and exit code 1, and names what may have been meant."""

    def error(self, message: str) -> Any:
        self.exit(1, f"{self.prog}: error: {message}\n")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does it, but for what is said of unknown flags."""
        values, unknown = self.parse_known_args(args, namespace)
        if unknown:
            hints = [hint for one in unknown if (hint := did_you_mean(one.partition("=")[0], self.actions()))]
            self.error(f"unrecognized arguments: {' '.join(unknown)}{''.join(hints)}")
        return values

    def actions(self) -> dict[str, argparse.Action]:
        """What each of its flags does."""
        return {option: action for action in self._actions for option in action.option_strings}


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """What may have been meant, in a bracket; nothing if nothing is like it."""
    found = difflib.get_close_matches(word, known, n=1, cutoff=0.75)
    return f" (did you mean {found[0]}?)" if found else ""
