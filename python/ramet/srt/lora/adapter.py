"""Owns what an adapter is to everybody: its name, and which matrices it adds to, by how much. Pure data, no torch.

An adapter adds scale * B A to a matrix of the model's, [output_size, input_size]: A is [rank, input_size], B
[output_size, rank] (https://arxiv.org/abs/2106.09685). The names of its tensors are peft's.
"""

import re

import msgspec

from ramet.srt.utils.outside_json import Natural
from ramet.srt.weights.manifest import LORA_ROLE

NO_ADAPTER = 0  # in place of an adapter's number: the model as it is
MAX_NAME_LEN = 256
PEFT_PREFIX = "base_model.model."  # of all tensors
ALL_LINEAR = "all-linear"  # in place of a pattern: all matrices but the output head
A_SUFFIX, B_SUFFIX = ".lora_A.weight", ".lora_B.weight"


class LoraModule(msgspec.Struct, frozen=True, kw_only=True):
    """One matrix that an adapter adds to."""

    name: str  # the matrix' own without ".weight", as "model.layers.0.self_attn.q_proj"
    rank: Natural
    scale: float
    file_name: str  # the same as the adapter's file has it: decoders without an output head have no "model." in front

    @property
    def a_name(self) -> str:
        """The tensor [rank, input_size]."""
        return f"{PEFT_PREFIX}{self.file_name}{A_SUFFIX}"

    @property
    def b_name(self) -> str:
        """The tensor [output_size, rank]."""
        return f"{PEFT_PREFIX}{self.file_name}{B_SUFFIX}"


class LoraTargets(msgspec.Struct, frozen=True, kw_only=True):
    """Which of a model's matrices an adapter means, by peft's rules."""

    chosen: str | list[str]  # a pattern of whole names, or the ends of names; ALL_LINEAR is for all
    excluded: str | list[str] = []  # in the same ways
    layers: list[int] = []  # of those whose names were listed; empty: all
    layers_in: list[str] = []  # patterns of what the layers are in; empty: anything

    def has(self, name: str) -> bool:
        """Whether a module is meant, by its name in the adapter's file. Raises ValueError if a pattern is none."""
        if self.excluded and _is_named(name, self.excluded):
            return False
        if self.chosen == ALL_LINEAR:
            return True
        if not _is_named(name, self.chosen):
            return False
        if isinstance(self.chosen, str) or not self.layers:
            return True
        patterns = [rf"(?:^|.*?\.){one}\.(\d+)\." for one in self.layers_in] or [r".*?\.[^.]*\.(\d+)\."]
        match = next(filter(None, (match_start(pattern, name) for pattern in patterns)), None)
        return match is not None and int(match[1]) in self.layers


class LoraAdapter(msgspec.Struct, frozen=True, kw_only=True):
    """A whole adapter, as whoever loads it needs to know it."""

    name: str
    dtype: str  # of its tensors
    digest: str  # of its file's content: see weights/content_digest.py
    modules: tuple[LoraModule, ...]
    targets: LoraTargets

    @property
    def max_rank(self) -> int:
        return max(module.rank for module in self.modules)


class LoraFile(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """An adapter's tensors lie in a file."""

    path: str


class LoraSeed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """An instance has loaded the adapter, and gives it away."""

    scheme: str
    host: str
    port: int
    name: str  # of the adapter there
    is_listed: bool = False  # at a metadata server, by whoever may publish there: it must not earn a key


LoraSource = LoraFile | LoraSeed


def lora_role(name: str) -> str:
    """The model role by which ranks offer their parts of an adapter: see weights/manifest.py."""
    return LORA_ROLE + name


def check_lora_name(name: str) -> str:
    """Raises ValueError unless requests, addresses and log lines can bear the name."""
    if not name or len(name) > MAX_NAME_LEN or not name.isprintable() or name != name.strip():
        raise ValueError(
            f"an adapter's name must have 1 to {MAX_NAME_LEN} printable characters, and no space at its ends; "
            f"got {name[:MAX_NAME_LEN]!r}"
        )
    return name


def split_tensor_name(name: str) -> tuple[str, bool] | None:
    """Which module a tensor of an adapter belongs to, and whether it is its A; None if it is something else."""
    match = re.fullmatch(rf"{re.escape(PEFT_PREFIX)}(.+)\.lora_([AB])\.weight", name)
    return None if match is None else (match[1], match[2] == "A")


def _is_named(name: str, names: str | list[str]) -> bool:
    """Whether a pattern fits the whole of a module's name, or one of several names the end of it."""
    if isinstance(names, str):
        return match_start(rf"(?:{names})\Z", name) is not None
    return any(name == one or name.endswith(f".{one}") for one in names)


def match_start(pattern: str, name: str) -> re.Match[str] | None:
    """How a name begins as a pattern says. Raises ValueError if that is no regular expression."""
    try:
        return re.match(pattern, name)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
