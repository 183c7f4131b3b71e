"""Owns what a mixture-of-experts model's config says of its experts, and which splits they allow. No torch."""

from dataclasses import dataclass
from typing import Any, Protocol


class IntegerReader(Protocol):
    """Reads positive integers from a config file and names the field when one is missing or wrong."""

    config: dict[str, Any]
    file: str

    def integer(self, name: str, default: int | None = None) -> int: ...


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """The experts of one model; all of its sparse layers are alike."""

    num_experts: int
    num_experts_per_tok: int
    intermediate_size: int  # of one expert
    norm_topk_prob: bool  # whether the chosen experts' weights are scaled to sum to 1
    sparse_layers: tuple[bool, ...]  # per layer: experts, or a plain MLP

    def check_split(self, tp_size: int, ep_size: int) -> None:
        """Raise ValueError, with the number that is in the way, unless the experts split over so many ranks."""
        if tp_size % ep_size:
            raise ValueError(f"--ep-size {ep_size} does not divide --tp-size {tp_size}")
        if self.num_experts % ep_size:
            raise ValueError(f"--ep-size {ep_size} does not divide the model's {self.num_experts} experts")
        moe_tp_size = tp_size // ep_size
        if self.intermediate_size % moe_tp_size:
            raise ValueError(
                f"--tp-size {tp_size} / --ep-size {ep_size} = {moe_tp_size} does not divide the experts' "
                f"intermediate size {self.intermediate_size}"
            )


def read_moe_config(architecture: str, need: IntegerReader, num_layers: int) -> MoeConfig | None:
    """The experts of `architecture`; None for a model that has none.

    Raises:
        ValueError: if a field is missing or wrong; the message names it.
    """
    if architecture == "Qwen3MoeForCausalLM":
        return _make(
            need,
            intermediate_size=need.integer("moe_intermediate_size"),
            norm_topk_prob=_flag(need, "norm_topk_prob"),
            sparse_layers=_sparse_layers(need, num_layers),
        )
    if architecture == "MixtralForCausalLM":
        return _make(
            need,
            intermediate_size=need.integer("intermediate_size"),
            norm_topk_prob=True,
            sparse_layers=(True,) * num_layers,
        )
    return None


def _make(need: IntegerReader, **fields: Any) -> MoeConfig:
    # transformers 5 writes Qwen3-MoE's num_experts under Mixtral's name.
    spelling = "num_experts" if "num_experts" in need.config else "num_local_experts"
    num_experts = need.integer(spelling)
    per_token = need.integer("num_experts_per_tok")
    if per_token > num_experts:
        raise ValueError(f"{need.file}: 'num_experts_per_tok' ({per_token}) is more than {spelling!r} ({num_experts})")
    return MoeConfig(num_experts=num_experts, num_experts_per_tok=per_token, **fields)


def _flag(need: IntegerReader, name: str) -> bool:
    value = need.config.get(name)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{need.file}: {name!r} must be true or false; got {value!r}")
    return bool(value)


def _sparse_layers(need: IntegerReader, num_layers: int) -> tuple[bool, ...]:
    """Every `decoder_sparse_step`-th layer has experts, but for the `mlp_only_layers`."""
    step = need.integer("decoder_sparse_step", default=1)
    plain = need.config.get("mlp_only_layers") or []
    if not isinstance(plain, list) or not all(type(index) is int and 0 <= index < num_layers for index in plain):
        raise ValueError(f"{need.file}: 'mlp_only_layers' must list layers in [0, {num_layers}); got {plain!r}")
    return tuple(index not in plain and (index + 1) % step == 0 for index in range(num_layers))
