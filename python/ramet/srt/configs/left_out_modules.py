"""Owns which modules a config leaves as they are: the patterns of each method, and what they match."""

import dataclasses
import fnmatch
import itertools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field


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
class ModuleNaming:
    """How a model's tool calls the modules that boxes name."""

    prefixes: tuple[str, ...] = ("model.",)  # of a decoder's modules, any of them; "model." in boxes
    is_fused: bool = False  # q, k and v are one module, and so are gate and up

    def own(self, name: str) -> list[str]:
        """What the module may have been called where the list was written."""
        return self._with_prefixes(_fused_name(name) if self.is_fused else name)

    def others(self, name: str) -> list[str]:
        """What engines call the module, or the one that it is a part of. None of their words stands for the rest."""
        names = [_fused_name(name)]
        if _EXPERT.search(name):
            names = [_EXPERT.sub(".experts.", one) for one in (name, *names)]
            # transformers 5 has one spelling for the experts of all families.
            names += [one.replace(".block_sparse_moe.", ".mlp.") for one in names if ".block_sparse_moe." in one]
        return [one for each in names for one in self._with_prefixes(each)] + [name]

    def _with_prefixes(self, name: str) -> list[str]:
        if not name.startswith("model."):
            return [name]
        return [prefix + name.removeprefix("model.") for prefix in self.prefixes]


PLAIN_NAMING = ModuleNaming()
_EXPERT = re.compile(r"\.experts\.\d+\.")
_FUSED = re.compile(r"\.(?:(?P<qkv>[qkv]_proj)|(?P<gate_up>(?:gate|up)_proj|w[13])|(?P<down>w2))$")


def _fused_name(name: str) -> str:
    return _FUSED.sub(lambda match: f".{match.lastgroup}_proj", name)


@dataclass(frozen=True, kw_only=True)
class Modules:
    """Some modules: lists have hundreds of patterns, and a model of experts has tens of thousands of names.

    Many of those are parts of one and the same stack, which is looked at once.

    A regular expression may mean what it does not name, "all but the language model", so that it is asked of none but
    the tool's own names. The rest says what it names, and in whatever spelling.
    """

    names: frozenset[str] = frozenset()
    parents: frozenset[str] = frozenset()  # with all that is in them
    ends: tuple[str, ...] = ()
    parts: frozenset[str] = frozenset()  # modules around it or in the middle of its name
    globs: re.Pattern[str] | None = None
    patterns: tuple[re.Pattern[str], ...] = ()  # of the beginning of a name
    _named: dict[str, bool] = field(default_factory=dict, compare=False)  # what was found of names before

    def matches(self, name: str, naming: ModuleNaming) -> bool:
        """Whether the module that boxes call `name` is one of them."""
        own = naming.own(name)
        if any(pattern.match(one) for pattern in self.patterns for one in own):
            return True
        return any(self._names(one) for one in (*own, *naming.others(name)))

    def _names(self, name: str) -> bool:
        found = self._named.get(name)
        if found is None:
            found = self._named[name] = self._look(name)
        return found

    def _look(self, name: str) -> bool:
        if name in self.names or name.endswith(self.ends):
            return True
        words = name.split(".")
        starts = range(len(words) if self.parts else 0)
        return (
            not self.parents.isdisjoint(itertools.accumulate(words, "{}.{}".format))
            or any(not self.parts.isdisjoint(itertools.accumulate(words[start:], "{}.{}".format)) for start in starts)
            or (self.globs is not None and self.globs.match(name) is not None)
        )


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
    """transformers' rule, or AutoAWQ's own: a part of the name, which must be of whole modules here.

    Where the part begins or ends with a dot, that says so.
    """
    return dataclasses.replace(_modules_of_transformers(ignored), parts=frozenset(name.strip(".") for name in ignored))


def _modules_of_compressed_tensors(ignored: tuple[str, ...]) -> Modules:
    """Whole names, the class of all these layers, or regular expressions for the beginning of names."""
    patterns = [pattern.removeprefix("re:") for pattern in ignored if pattern.startswith("re:")]
    if "Linear" in ignored:
        patterns.append("")
    return Modules(names=frozenset(ignored), patterns=tuple(map(re.compile, patterns)))


def _modules_of_modelopt(ignored: tuple[str, ...]) -> Modules:
    """Shell patterns for whole names, or names of modules with all that is in them."""
    wild = [fnmatch.translate(pattern) for pattern in ignored if re.search(r"[*?\[]", pattern)]
    return Modules(parents=frozenset(ignored), globs=re.compile("|".join(wild)) if wild else None)


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
