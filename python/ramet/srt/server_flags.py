"""Owns all flags together, in their sections: the command line, docs/flags.md and ServerArgs are made of them."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ramet.srt.flags.flag import flag_name
from ramet.srt.flags.http_flags import HttpFlags
from ramet.srt.flags.log_flags import LogFlags
from ramet.srt.flags.lora_flags import LoraFlags
from ramet.srt.flags.model_flags import ModelFlags
from ramet.srt.flags.parallel_flags import ParallelFlags
from ramet.srt.flags.runtime_flags import RuntimeFlags
from ramet.srt.flags.weight_flags import WeightFlags

SECTIONS: dict[str, type] = {
    "Model": ModelFlags,
    "HTTP": HttpFlags,
    "Logs": LogFlags,
    "Runtime": RuntimeFlags,
    "Adapters": LoraFlags,
    "Parallelism": ParallelFlags,
    "Weights": WeightFlags,
}
# What other servers have a flag for and this one needs none: taken with a line of the log. None of them has a value.
NEEDLESS = {
    "--enable-metrics": "/metrics is always there",
    "--trust-remote-code": "no code that comes with a model is ever run; what is not supported is refused",
    "--enable-cache-report": "answers always say how many tokens came from the prefix cache",
    "--enable-mixed-chunk": "passes always mix prompts with decoding",
    "--enable-chunked-prefill": "long prompts are always split, see --chunked-prefill-size",
    "--enable-prefix-caching": "prefixes are always kept, unless --disable-radix-cache is given",
    "--enable-auto-tool-choice": "models always choose tools, see --tool-call-parser",
    "--skip-server-warmup": "the first pass is always warmed up, which takes no request",
}


# In the reverse order: dataclasses puts the fields of the last base first.
@dataclass(frozen=True, kw_only=True)
class ServerFlags(WeightFlags, ParallelFlags, LoraFlags, RuntimeFlags, LogFlags, HttpFlags, ModelFlags):
    """The fields of ServerArgs, each valid by itself."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.metadata["several"]:
                self._make_tuple(field)
            self._validate_value(field)

    def _make_tuple(self, field: dataclasses.Field[Any]) -> None:
        """One value may be given by itself, and several in any sequence, such as one that has been JSON."""
        value = getattr(self, field.name)
        values = () if value is None else (value,) if isinstance(value, str) else tuple(value)
        object.__setattr__(self, field.name, values)

    def _validate_value(self, field: dataclasses.Field[Any]) -> None:
        choices, limit = field.metadata["choices"], field.metadata["limit"]
        value = getattr(self, field.name)
        if value is None and (choices or field.default is None):
            return
        if choices and value not in choices:
            raise ValueError(f"{flag_name(field.name)} must be one of {', '.join(choices)}; got {value!r}")
        if limit and (value is None or not limit.holds(value)):
            raise ValueError(f"{flag_name(field.name)} must {limit.text}; got {value}")


def sectioned_fields() -> Iterator[tuple[str, tuple[dataclasses.Field[Any], ...]]]:
    """The sections in their order, each with its fields."""
    for section, flags in SECTIONS.items():
        yield section, dataclasses.fields(flags)
