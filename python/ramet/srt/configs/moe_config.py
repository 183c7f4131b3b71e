"""Owns what a mixture-of-experts model's config says of its experts, and which splits they allow. No torch."""

from dataclasses import dataclass

from ramet.srt.configs.config_reader import ConfigReader
from ramet.srt.configs.model_family import ExpertTraits


@dataclass(frozen=True)
class ClampedGate:
    """gpt-oss's activation: g * sigmoid(alpha * g) * (u + 1), with g at most `limit` and u within it on both sides."""

    alpha: float
    limit: float


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """The experts of one model; all of its sparse layers are alike."""

    num_experts: int
    num_experts_per_tok: int
    intermediate_size: int  # of one expert
    norm_topk_prob: bool  # whether the chosen experts' weights are scaled to sum to 1
    sparse_layers: tuple[bool, ...]  # per layer: experts, or a plain MLP
    traits: ExpertTraits = ExpertTraits()
    scaling_factor: float = 1.0  # of the chosen experts' weights, in the end
    num_groups: int = 1  # of neighbouring experts; a token's experts are of `num_kept_groups` of them
    num_kept_groups: int = 1
    clamped_gate: ClampedGate | None = None  # in place of the config's activation
    shared_intermediate_size: int = 0  # of the expert that all tokens go through; 0: there is none

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
        if self.shared_intermediate_size % tp_size:
            raise ValueError(
                f"--tp-size {tp_size} does not divide the shared expert's intermediate size "
                f"{self.shared_intermediate_size}"
            )


def read_moe_config(need: ConfigReader, num_layers: int) -> MoeConfig | None:
    """The experts of the config's architecture; None for a model that has none.

    Raises:
        ValueError: if a field is missing or wrong; the message names it.
    """
    spelling = _spelling(need)
    if spelling is None:
        return None
    traits = need.family.experts
    num_experts, per_token = need.integer(spelling), need.integer("num_experts_per_tok")
    if per_token > num_experts:
        raise ValueError(f"{need.file}: 'num_experts_per_tok' ({per_token}) is more than {spelling!r} ({num_experts})")
    num_groups = need.integer("n_group") if need.has("n_group") else 1
    if num_experts % num_groups or (need.has("n_group") and num_experts // num_groups < 2):
        raise need.wrong("n_group", f"must divide the {num_experts} experts into groups of at least 2", num_groups)
    num_kept_groups = need.integer("topk_group", maximum=num_groups) if need.has("topk_group") else 1
    if per_token > num_experts // num_groups * num_kept_groups:
        raise ValueError(f"{need.file}: 'num_experts_per_tok' ({per_token}) is more than 'topk_group' groups have")
    # Without a key of its own an expert's size is the MLP's, and all layers have experts.
    has_own_size = need.has("moe_intermediate_size")
    return MoeConfig(
        num_experts=num_experts,
        num_experts_per_tok=per_token,
        intermediate_size=need.integer("moe_intermediate_size" if has_own_size else "intermediate_size"),
        norm_topk_prob=traits.always_normalised or need.flag("norm_topk_prob"),
        sparse_layers=_sparse_layers(need, num_layers) if has_own_size else (True,) * num_layers,
        traits=traits,
        scaling_factor=need.number("routed_scaling_factor") if need.has("routed_scaling_factor") else 1.0,
        num_groups=num_groups,
        num_kept_groups=num_kept_groups,
        clamped_gate=_clamped_gate(need),
        shared_intermediate_size=_shared_size(need),
    )


def _clamped_gate(need: ConfigReader) -> ClampedGate | None:
    if not need.has("swiglu_limit"):
        return None
    return ClampedGate(need.number("swiglu_alpha"), need.number("swiglu_limit"))


def _shared_size(need: ConfigReader) -> int:
    if need.has("n_shared_experts"):
        return need.integer("n_shared_experts") * need.integer("moe_intermediate_size")
    return need.integer("shared_expert_intermediate_size") if need.has("shared_expert_intermediate_size") else 0


def _spelling(need: ConfigReader) -> str | None:
    """Which key has the number of experts: the family's, or Mixtral's, which transformers 5 takes for several."""
    names = ("n_routed_experts" if need.has("n_routed_experts") else "num_experts", "num_local_experts")
    if not any(need.has(name) for name in names):
        return None
    need.take(*names)
    present = [name for name in names if name in need.config]
    if len(present) == 2 and need.config[present[0]] != need.config[present[1]]:
        values = " and ".join(f"{name!r} ({need.config[name]!r})" for name in present)
        raise ValueError(f"{need.file}: {values} are two names of one number, and differ")
    return present[0] if present else next(name for name in names if need.has(name))


def _sparse_layers(need: ConfigReader, num_layers: int) -> tuple[bool, ...]:
    """All but the first, those of a list, or every `decoder_sparse_step`-th has experts, but for `mlp_only_layers`."""
    has_types = need.has("mlp_layer_types") and need.value("mlp_layer_types") is not None
    if need.has("first_k_dense_replace") and not has_types:
        first = need.integer("first_k_dense_replace", minimum=0)
        return tuple(index >= first for index in range(num_layers))
    if need.has("mlp_layer_types"):
        return _sparse_by_type(need, num_layers)
    if not need.has("decoder_sparse_step"):
        return (True,) * num_layers
    step = need.integer("decoder_sparse_step")
    plain = need.value("mlp_only_layers")
    if plain is None:
        return tuple((index + 1) % step == 0 for index in range(num_layers))
    if not isinstance(plain, list) or not all(type(index) is int and 0 <= index < num_layers for index in plain):
        raise need.wrong("mlp_only_layers", f"must list layers in [0, {num_layers})", plain)
    return tuple(index not in plain and (index + 1) % step == 0 for index in range(num_layers))


def _sparse_by_type(need: ConfigReader, num_layers: int) -> tuple[bool, ...]:
    """By `mlp_layer_types`, or all but the first; an older key must say the same."""
    kinds = need.value("mlp_layer_types")
    sparse = tuple(index > 0 for index in range(num_layers))
    if kinds is not None:
        if (
            not isinstance(kinds, list)
            or len(kinds) != num_layers
            or any(kind not in ("dense", "sparse") for kind in kinds)
        ):
            raise need.wrong("mlp_layer_types", f"must give dense or sparse for each of {num_layers} layers", kinds)
        sparse = tuple(kind == "sparse" for kind in kinds)
    need.take("first_k_dense_replace")
    if need.has("first_k_dense_replace"):
        need.integer("first_k_dense_replace", minimum=0)
    first = need.config.get("first_k_dense_replace")
    if first is not None and (type(first) is not int or sparse != tuple(index >= first for index in range(num_layers))):
        dense = [index for index in range(num_layers) if not sparse[index]]
        raise need.wrong(
            "first_k_dense_replace", f"must fit 'mlp_layer_types', by which layers {dense} are dense", first
        )
    return sparse
