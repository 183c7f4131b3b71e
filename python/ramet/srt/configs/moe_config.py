"""Owns what a mixture-of-experts model's config says of its experts, and which splits they allow. No torch."""

from dataclasses import dataclass
from typing import Any

from ramet.srt.configs.config_reader import ConfigReader


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


def read_moe_config(need: ConfigReader, num_layers: int) -> MoeConfig | None:
    """The experts of the config's architecture; None for a model that has none.

    Raises:
        ValueError: if a field is missing or wrong; the message names it.
    """
    if not need.has("num_experts"):
        return None
    if not need.has("moe_intermediate_size"):  # Mixtral: experts in all layers, and nothing but experts
        return _make(
            need,
            intermediate_size=need.integer("intermediate_size"),
            norm_topk_prob=True,
            sparse_layers=(True,) * num_layers,
        )
    return _make(
        need,
        intermediate_size=need.integer("moe_intermediate_size"),
        norm_topk_prob=need.flag("norm_topk_prob"),
        sparse_layers=_sparse_layers(need, num_layers),
    )


def _make(need: ConfigReader, **fields: Any) -> MoeConfig:
    spelling = _spelling(need)
    num_experts = need.integer(spelling)
    per_token = need.integer("num_experts_per_tok")
    if per_token > num_experts:
        raise ValueError(f"{need.file}: 'num_experts_per_tok' ({per_token}) is more than {spelling!r} ({num_experts})")
    return MoeConfig(num_experts=num_experts, num_experts_per_tok=per_token, **fields)


def _spelling(need: ConfigReader) -> str:
    """Which key has the number of experts: Qwen3-MoE's or Mixtral's, under whose name transformers 5 writes both."""
    names = ("num_experts", "num_local_experts")
    need.take(*names)
    present = [name for name in names if name in need.config]
    if len(present) == 2 and need.config[present[0]] != need.config[present[1]]:
        values = " and ".join(f"{name!r} ({need.config[name]!r})" for name in present)
        raise ValueError(f"{need.file}: {values} are two names of one number, and differ")
    return present[0] if present else "num_experts"


def _sparse_layers(need: ConfigReader, num_layers: int) -> tuple[bool, ...]:
    """Every `decoder_sparse_step`-th layer has experts, but for the `mlp_only_layers`."""
    step = need.integer("decoder_sparse_step")
    plain = need.value("mlp_only_layers")
    if plain is None:
        return tuple((index + 1) % step == 0 for index in range(num_layers))
    if not isinstance(plain, list) or not all(type(index) is int and 0 <= index < num_layers for index in plain):
        raise need.wrong("mlp_only_layers", f"must list layers in [0, {num_layers})", plain)
    return tuple(index not in plain and (index + 1) % step == 0 for index in range(num_layers))
