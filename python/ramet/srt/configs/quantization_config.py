"""Owns what a model's configs say of its quantised weights: read once, checked key by key, refused where not served.

Three spellings are read: the method "fp8" (fine-grained, as DeepSeek and Qwen publish it), compressed-tensors, and
modelopt, in config.json's `quantization_config` or in modelopt's own hf_quant_config.json.
"""

import fnmatch
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

CONFIG_FILE = "config.json"
MODELOPT_FILE = "hf_quant_config.json"
WHOLE_ROW = 1 << 30  # columns of a block: more than any matrix has
STRATEGIES = ("channel", "tensor", "block")
SERVED = "fp8 weights: quant_method fp8, compressed-tensors float-quantized and modelopt FP8"


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """How the weights of linear layers and experts are quantised. Embedding, head, router and norms aren't."""

    name: str = "fp8"  # what manifests and --quantization call it
    method: str  # "online": while bf16 files are read; else the config's own word
    file: str  # that says so
    strategy: str  # one of STRATEGIES: a scale for each row, for the whole matrix, or for each block of it
    block_size: tuple[int, int] | None = None  # rows and columns that share a scale, with strategy "block"
    activation_scheme: str = "dynamic"  # none, dynamic or static, as the files have it: see docs/formats.md
    ignored: tuple[str, ...] = ()  # patterns of modules that are not quantised, by the rules of `method`

    @property
    def is_online(self) -> bool:
        """Whether the files hold plain weights, which are quantised while they are read."""
        return self.method == "online"

    def is_ignored(self, module_name: str) -> bool:
        """Whether the checkpoint's linear layer of that name, such as model.layers.0.mlp.up_proj, is not quantised."""
        return self._left_out.matches(module_name)

    @functools.cached_property
    def _left_out(self) -> "_Modules":
        return _MODULES[self.method](self.ignored)

    @property
    def summary(self) -> str:
        """For a log line."""
        if self.is_online:
            return "quantised by row while they are read"
        size = self.block_size
        by_row = size is None or size[1] == WHOLE_ROW
        scales = "rows" if by_row or size is None else f"blocks of {size[0]} x {size[1]}"
        rest = "activations and cache keep the model's type" if size else "the cache keeps the model's type"
        return f"as they are in the files, with scales of {scales}; {rest} ({self.file})"

    @property
    def dimensions(self) -> dict[str, int]:
        """The sizes of blocks, by names that other instances compare; none where rows have scales."""
        if self.block_size is None:
            return {}
        return {"weight_block_rows": self.block_size[0], "weight_block_columns": self.block_size[1]}


def read_quantization(
    hf_config: Mapping[str, Any], modelopt: Mapping[str, Any] | None, folder: str, wanted: str | None
) -> QuantizationConfig | None:
    """What the files of a model say, and the user wants; None for weights that are not quantised.

    Args:
        modelopt: the content of hf_quant_config.json, if there is one.
        wanted: "fp8" to quantise plain weights while they are read; changes nothing for a checkpoint of fp8 weights.

    Raises:
        ValueError: for anything that is not served, or not known; the message names the file and the word in it.
    """
    found = []
    for key in ("quantization_config", "compression_config"):  # the second is compressed-tensors' older one
        if section := hf_config.get(key):
            found.append(_read_section(section, f"{folder}/{CONFIG_FILE}: {key}"))
            break
    if modelopt is not None:
        found.append(_read_modelopt_file(modelopt, f"{folder}/{MODELOPT_FILE}"))
    known = [config for config in found if config is not None]
    if len(found) == 2 and len({config and config.strategy for config in found}) > 1:
        said = [f"{config.strategy} scales" if config else "no quantised weights" for config in found]
        raise ValueError(f"{folder}: {CONFIG_FILE} says {said[0]}, {MODELOPT_FILE} says {said[1]}")
    if known:
        return known[0]
    if wanted:
        return QuantizationConfig(method="online", file="--quantization fp8", strategy="channel")
    return None


def _read_section(section: Any, where: str) -> QuantizationConfig | None:
    if not isinstance(section, Mapping):
        raise ValueError(f"{where} must be an object; got {section!r}")
    method = section.get("quant_method")
    if method is None and "quant_algo" in section:
        method = "modelopt"
    reader = _READERS.get(str(method))
    if reader is None:
        raise ValueError(f"{where}: the quantisation {method!r} is not supported; served are {SERVED}")
    return reader(section, where)


class _Section:
    """Reads the keys of an object, and refuses those that nobody has read."""

    def __init__(self, section: Mapping[str, Any], where: str):
        self.where = where
        self._left = dict(section)

    def take(self, name: str, default: Any = None) -> Any:
        value = self._left.pop(name, None)
        return default if value is None else value

    def says(self, name: str, *words: str) -> bool:
        """Whether a key, which stays unread, has one of these values."""
        return self._left.get(name) in words

    def ignore(self, *names: str) -> None:
        """Keys that say nothing of the computation."""
        for name in names:
            self._left.pop(name, None)

    def expect(self, name: str, *allowed: Any, default: Any = None) -> Any:
        """A value that must be one of those served; absent or null, `default`."""
        value = self.take(name, default)
        if not any(type(value) is type(word) and value == word for word in allowed):
            words = " or ".join(repr(word) for word in allowed if word is not None)
            raise ValueError(f"{self.where}: {name} {value!r} is not supported; {words} is")
        return value

    def section(self, name: str) -> "_Section | None":
        value = self.take(name)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise ValueError(f"{self.where}: {name} must be an object; got {value!r}")
        return _Section(value, f"{self.where}.{name}")

    def names(self, name: str) -> tuple[str, ...]:
        value = self.take(name, [])
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) and item for item in value):
            raise ValueError(f"{self.where}: {name} must be a list of names; got {value!r}")
        return tuple(value)

    @property
    def left(self) -> list[str]:
        """The keys that nobody has read and that say something."""
        return sorted(name for name, value in self._left.items() if value not in (None, {}, [], False, ""))

    def finish(self) -> None:
        """Raise ValueError if a key that says something is left."""
        if left := self.left:
            raise ValueError(f"{self.where}: {', '.join(map(repr, left))} may change the computation and is not known")


def _read_fp8(section: Mapping[str, Any], where: str) -> QuantizationConfig:
    """Fine-grained fp8: DeepSeek's spelling, which transformers, SGLang and vLLM read."""
    keys = _Section(section, where)
    keys.ignore("quant_method", "dequantize", "is_checkpoint_fp8_serialized")  # loaded or dequantised: the same values
    block_size = _block_size(keys.take("weight_block_size"), where)
    keys.expect("fmt", "e4m3", "float8_e4m3fn", default="e4m3")
    keys.expect("scale_fmt", "float", "ue8m0", default="float")  # the scales' own type tells which
    keys.expect("expert_dtype", "fp8", default="fp8")
    scheme = keys.expect("activation_scheme", "dynamic", "static", default="dynamic")
    ignored = keys.names("modules_to_not_convert") or keys.names("ignored_layers")
    keys.ignore("ignored_layers")
    _expect_known_cache(keys)
    keys.finish()
    return QuantizationConfig(
        method="fp8", file=where, strategy="block" if block_size else "tensor", block_size=block_size,
        activation_scheme=scheme, ignored=_checked(ignored, where, ""),
    )  # fmt: skip


def _block_size(value: Any, where: str) -> tuple[int, int] | None:
    if value is None:
        return None
    if isinstance(value, str) and "x" in value:
        value = [int(part) if part.isascii() and part.isdigit() else part for part in value.split("x")]
    if not isinstance(value, list | tuple) or len(value) != 2 or any(type(n) is not int or n < 1 for n in value):
        raise ValueError(f"{where}: the size of weight blocks must be two positive integers; got {value!r}")
    return value[0], value[1]


def _read_compressed_tensors(section: Mapping[str, Any], where: str) -> QuantizationConfig:
    keys = _Section(section, where)
    keys.ignore("quant_method", "quantization_status", "global_compression_ratio", "version")
    _expect_float_format(keys)
    if sparsity := keys.section("sparsity_config"):
        sparsity.expect("format", "dense", default="dense")
    groups = keys.section("config_groups")
    ignored = _checked(keys.names("ignore"), where, "re:")
    _expect_known_cache(keys)
    keys.finish()  # transform_config and what comes later
    names = groups.left if groups is not None else []
    group = groups.section(names[0]) if groups is not None and len(names) == 1 else None
    if group is None:
        raise ValueError(f"{where}: config_groups must hold one group; it holds {', '.join(names) or 'none'}")
    _expect_float_format(group)
    targets = group.names("targets")
    if targets != ("Linear",):
        raise ValueError(f"{group.where}: targets {list(targets)} is not supported; ['Linear'] is")
    strategy, block_size = _read_weights(group)
    scheme = _read_activations(group.section("input_activations"))
    if scheme == "none" and block_size is None:
        # As blocks, rows are multiplied with activations as they are, on a GPU too.
        strategy, block_size = "block", (1, WHOLE_ROW)
    group.finish()
    return QuantizationConfig(
        method="compressed-tensors", file=where, strategy=strategy, block_size=block_size,
        activation_scheme=scheme, ignored=ignored,
    )  # fmt: skip


def _expect_known_cache(keys: _Section) -> None:
    """The cache keeps the model's type, which is more exact than fp8; files made for narrower ones are refused."""
    if keys.says("kv_cache_scheme", "static", "dynamic"):  # AutoFP8's spelling
        keys.ignore("kv_cache_scheme")
    elif cache := keys.section("kv_cache_scheme"):
        cache.expect("num_bits", 8)
        cache.expect("type", "float")


def _expect_float_format(keys: _Section) -> None:
    keys.expect("format", "float-quantized", "naive-quantized", default="float-quantized")


def _read_weights(group: _Section) -> tuple[str, tuple[int, int] | None]:
    weights = group.section("weights")
    if weights is None:
        raise ValueError(f"{group.where}: it does not say how weights are quantised")
    weights.ignore(
        "observer", "observer_kwargs", "scale_dtype", "zp_dtype"
    )  # how they were found; the files' own types
    weights.expect("num_bits", 8)
    weights.expect("type", "float")
    weights.expect("symmetric", True, default=True)
    weights.expect("dynamic", False, default=False)
    strategy = weights.expect("strategy", *STRATEGIES, default="tensor")
    block_size = _block_size(weights.take("block_structure"), weights.where)
    if (strategy == "block") != (block_size is not None):
        raise ValueError(f"{weights.where}: strategy {strategy!r} with block_structure {block_size} makes no sense")
    weights.finish()  # actorder, group_size and what comes later
    return strategy, block_size


def _read_activations(keys: _Section | None) -> str:
    """Activations keep the model's type, which is more exact than any of these: see docs/formats.md."""
    if keys is None:
        return "none"
    keys.expect("num_bits", 8)
    keys.expect("type", "float")
    return "dynamic" if keys.take("dynamic", False) else "static"


MODELOPT_STRATEGIES = {"FP8": ("tensor", "static"), "FP8_PER_CHANNEL_PER_TOKEN": ("channel", "dynamic")}


def _read_modelopt(section: Mapping[str, Any], where: str) -> QuantizationConfig | None:
    """modelopt's part of config.json; its groups say again what the algorithm's name does."""
    keys = _Section(section, where)
    keys.ignore("quant_method", "producer", "config_groups")
    return _modelopt_config(keys)


def _read_modelopt_file(content: Mapping[str, Any], where: str) -> QuantizationConfig | None:
    keys = _Section(content, where)
    keys.ignore("producer")
    inner = keys.section("quantization")
    keys.finish()
    if inner is None:
        raise ValueError(f"{where}: it has no object 'quantization'")
    inner.ignore("quant_method")
    return _modelopt_config(inner)


def _modelopt_config(keys: _Section) -> QuantizationConfig | None:
    algorithm = keys.take("quant_algo")
    if algorithm is not None and algorithm not in MODELOPT_STRATEGIES:
        raise ValueError(f"{keys.where}: the quantisation {algorithm!r} is not supported; served are {SERVED}")
    keys.expect("kv_cache_quant_algo", None, "FP8")
    _expect_known_cache(keys)
    ignored = dict.fromkeys(keys.names("exclude_modules") + keys.names("ignore"))
    keys.finish()
    if algorithm is None:
        return None
    strategy, scheme = MODELOPT_STRATEGIES[algorithm]
    return QuantizationConfig(
        method="modelopt", file=keys.where, strategy=strategy, activation_scheme=scheme,
        ignored=_checked(ignored, keys.where, None),
    )  # fmt: skip


def _checked(patterns: Iterable[str], where: str, prefix: str | None) -> tuple[str, ...]:
    """The patterns, once those that begin with `prefix` are found to be regular expressions."""
    for pattern in patterns:
        if prefix is not None and pattern.startswith(prefix):
            try:
                re.compile(pattern.removeprefix(prefix))
            except re.error as error:
                raise ValueError(f"{where}: {pattern!r} is no regular expression: {error}") from None
    return tuple(patterns)


@dataclass(frozen=True, kw_only=True)
class _Modules:
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


def _modules_of_fp8(ignored: tuple[str, ...]) -> _Modules:
    """transformers' rule: by regular expression a beginning of the name, up to the end of a module's; or its end."""
    parents = frozenset(pattern for pattern in ignored if re.fullmatch(r"\w+(\.\w+)*", pattern))
    others = [pattern for pattern in ignored if pattern not in parents]
    return _Modules(
        parents=parents,
        ends=ignored,
        patterns=tuple(re.compile(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))") for pattern in others),
    )


def _modules_of_compressed_tensors(ignored: tuple[str, ...]) -> _Modules:
    """Whole names, the class of all these layers, or regular expressions for the beginning of names."""
    patterns = [pattern.removeprefix("re:") for pattern in ignored if pattern.startswith("re:")]
    if "Linear" in ignored:
        patterns.append("")
    return _Modules(names=frozenset(ignored), patterns=tuple(map(re.compile, patterns)))


def _modules_of_modelopt(ignored: tuple[str, ...]) -> _Modules:
    """Shell patterns for whole names, or names of modules with all that is in them."""
    wild = [pattern for pattern in ignored if re.search(r"[*?\[]", pattern)]
    patterns = tuple(re.compile(fnmatch.translate(pattern)) for pattern in wild)
    return _Modules(parents=frozenset(ignored), patterns=patterns)


_MODULES: dict[str, Callable[[tuple[str, ...]], _Modules]] = {
    "online": lambda _ignored: _Modules(),
    "fp8": _modules_of_fp8,
    "compressed-tensors": _modules_of_compressed_tensors,
    "modelopt": _modules_of_modelopt,
}

_READERS: dict[str, Callable[[Mapping[str, Any], str], QuantizationConfig | None]] = {
    "fp8": _read_fp8,
    "compressed-tensors": _read_compressed_tensors,
    "modelopt": _read_modelopt,
    "modelopt_fp8": _read_modelopt,
}
