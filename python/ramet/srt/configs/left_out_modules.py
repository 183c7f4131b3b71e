"""Owns which modules a config leaves as they are: the patterns of each method, and what they match."""

import dataclasses
import fnmatch
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass


def checked_patterns(patterns: Iterable[str], where: str, prefix: str | None) -> tuple[str, ...]:
    """The patterns, once those that begin with `prefix` are found to be regular expressions."""
    for pattern in patterns:
        if prefix is not None and pattern.startswith(prefix):
            try:
                re.compile(pattern.removeprefix(prefix))
            except re.error as error:
                raise ValueError(f"{where}: {pattern!r} is no regular expression: {error}") from None
    return tuple(patterns)


@dataclass(frozen=True, kw_only=True)
class Modules:
    """Some modules: lists have hundreds of patterns, and a model of experts has tens of thousands of names."""

    names: frozenset[str] = frozenset()
    parents: frozenset[str] = frozenset()  # with all that is in them
    ends: tuple[str, ...] = ()
    patterns: tuple[re.Pattern[str], ...] = ()  # of the beginning of a name

    def matches(self, name: str) -> bool:
        if name in self.names or name.endswith(self.ends):
            return True
        if self.parents:
            dots = [match.start() for match in re.finditer(r"\.", name)]
            if not self.parents.isdisjoint(name[:end] for end in (*dots, len(name))):
                return True
        return any(pattern.match(name) for pattern in self.patterns)


def _modules_of_transformers(ignored: tuple[str, ...]) -> Modules:
    """transformers' rule: by regular expression a beginning of the name, up to the end of a module's; or its end."""
    parents = frozenset(pattern for pattern in ignored if re.fullmatch(r"\w+(\.\w+)*", pattern))
    others = [pattern for pattern in ignored if pattern not in parents]
    return Modules(
        parents=parents,
        ends=ignored,
        patterns=tuple(re.compile(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))") for pattern in others),
    )


def _modules_of_awq(ignored: tuple[str, ...]) -> Modules:
    """transformers' rule, or AutoAWQ's own: a part of the name, which must be of whole modules here."""
    by_rule = _modules_of_transformers(ignored)
    parts = tuple(re.compile(rf"(?:.*\.)?{re.escape(name)}(?:\.|$)") for name in ignored)
    return dataclasses.replace(by_rule, patterns=by_rule.patterns + parts)


def _modules_of_compressed_tensors(ignored: tuple[str, ...]) -> Modules:
    """Whole names, the class of all these layers, or regular expressions for the beginning of names."""
    patterns = [pattern.removeprefix("re:") for pattern in ignored if pattern.startswith("re:")]
    if "Linear" in ignored:
        patterns.append("")
    return Modules(names=frozenset(ignored), patterns=tuple(map(re.compile, patterns)))


def _modules_of_modelopt(ignored: tuple[str, ...]) -> Modules:
    """Shell patterns for whole names, or names of modules with all that is in them."""
    wild = [pattern for pattern in ignored if re.search(r"[*?\[]", pattern)]
    patterns = tuple(re.compile(fnmatch.translate(pattern)) for pattern in wild)
    return Modules(parents=frozenset(ignored), patterns=patterns)


MODULES: dict[str, Callable[[tuple[str, ...]], Modules]] = {
    "online": lambda _ignored: Modules(),
    "fp8": _modules_of_transformers,
    "fbgemm_fp8": _modules_of_transformers,
    "mxfp4": _modules_of_transformers,
    "mxfp8": _modules_of_transformers,
    "compressed-tensors": _modules_of_compressed_tensors,
    "awq": _modules_of_awq,
    "gptq": lambda ignored: Modules(patterns=tuple(map(re.compile, ignored))),
    "modelopt": _modules_of_modelopt,
}
