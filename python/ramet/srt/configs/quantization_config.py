"""Owns how a model's weights are quantised, as its files or the user say it: which of them, and in which format."""

import functools
from dataclasses import dataclass

from ramet.srt.configs.left_out_modules import MODULES, PLAIN_NAMING, ModuleNaming, Modules
from ramet.srt.configs.weight_format import WeightFormat

WEIGHT_SUFFIX = ".weight"


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """How the weights of linear layers and experts are quantised. Embedding, head, router and norms aren't."""

    method: str  # "online": while bf16 files are read; else the config's own word
    file: str  # that says so
    format: WeightFormat
    ignored: tuple[str, ...] = ()  # patterns of modules that are not quantised, by the rules of `method`
    naming: ModuleNaming = PLAIN_NAMING

    @property
    def name(self) -> str:
        """What manifests call it."""
        return self.format.name

    @property
    def is_online(self) -> bool:
        """Whether the files hold plain weights, which are quantised while they are read."""
        return self.method == "online"

    def is_ignored(self, module_name: str) -> bool:
        """Whether the checkpoint's linear layer of that name, such as model.layers.0.mlp.up_proj, is not quantised."""
        return self._left_out.matches(module_name, self.naming)

    @functools.cached_property
    def _left_out(self) -> Modules:
        return MODULES[self.method](self.ignored)

    @property
    def summary(self) -> str:
        """For a log line."""
        if self.is_online:
            return "quantised by row while they are read"
        rest = "the cache keeps" if self.format.multiplies_fp8 else "activations and cache keep"
        words = f"as they are in the files, with scales of {self.format.summary}; {rest} the model's type"
        return f"{words} ({self.file})"

    @property
    def dimensions(self) -> dict[str, int]:
        """What tells formats of one name apart, by names that other instances compare; none for fp8 by row."""
        return self.format.sizes

    @property
    def block_size(self) -> tuple[int, int] | None:
        """Rows and columns that share a scale in fp8; None where each row has its own."""
        return (self.format.scales.rows, self.format.scales.columns) if self.format.has_blocks else None
