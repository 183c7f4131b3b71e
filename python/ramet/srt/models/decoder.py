"""Owns the decoder that all model families are: its layers are built from the traits that a config was read into."""

import functools

import torch
from torch import nn

from ramet.srt.batch.forward_batch_info import ForwardBatch
from ramet.srt.configs.layer_specs import LayerSpec
from ramet.srt.configs.model_config import ModelConfig
from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.configs.rope_config import RopeConfig
from ramet.srt.distributed.communication_op import gather_attention_groups, sum_for_attention_groups
from ramet.srt.layers.attention.radix_attention import HeadNorms, RadixAttention
from ramet.srt.layers.layernorm import RMSNorm, ShardedRMSNorm, norm_in_place
from ramet.srt.layers.linear import QKVParallelLinear, RowParallelLinear
from ramet.srt.layers.mlp import GatedMLP
from ramet.srt.layers.moe import SparseMoeBlock
from ramet.srt.layers.parameter import declare_weight, shard_box
from ramet.srt.layers.rotary_embedding import RotaryEmbedding, Rotation
from ramet.srt.layers.row_sums import RowSums, whole
from ramet.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from ramet.srt.mem_cache.memory_pool import KVSpec
from ramet.srt.models.attention_block import AttentionBlock
from ramet.srt.models.delta_net import DeltaNet
from ramet.srt.models.latent_attention import LatentAttention
from ramet.srt.models.row_path import RowPath
from ramet.srt.models.stage_border import choice_columns, take_choice, with_choice

# A layer's norms: before and after attention, before and after the MLP. One name stands for two of them.
NORM_NAMES = {
    "before": ("input_layernorm", "", "post_attention_layernorm", ""),
    "after": ("", "post_attention_layernorm", "", "post_feedforward_layernorm"),
    "both": (
        "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
    ),
}  # fmt: skip


class Attention(AttentionBlock):
    """Grouped-query attention."""

    def __init__(self, model: "DecoderForCausalLM", spec: LayerSpec, layer_id: int, prefix: str):
        super().__init__()
        config, traits, dtype, parallel = model.config, model.config.traits, model.dtype, model.parallel
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            config.head_dim,
            config.num_attention_heads,
            config.num_key_value_heads,
            prefix,
            bias=traits.qkv_bias,
            dtype=dtype,
            parallel=parallel.attention,
            query_columns=2 * config.head_dim if traits.has_output_gate else None,
        )
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * config.head_dim,
            config.hidden_size,
            f"{prefix}.o_proj",
            bias=traits.o_bias,
            dtype=dtype,
            parallel=parallel.attention,
        )
        self.norms: HeadNorms | None = None  # of each head
        self.wide_norms: list[ShardedRMSNorm] | None = None  # of all heads together
        self.attn_tp_size = parallel.attention.tp_size
        if traits.qk_norm == "head":
            self.q_norm = model.make_norm(f"{prefix}.q_norm", config.head_dim)
            self.k_norm = model.make_norm(f"{prefix}.k_norm", config.head_dim)
            self.norms = HeadNorms(self.q_norm, self.k_norm)
        elif traits.qk_norm == "all":
            ranges = {"q": (config.num_attention_heads, self.qkv_proj.q_range),
                      "k": (config.num_key_value_heads, self.qkv_proj.kv_range)}  # fmt: skip
            self.q_norm, self.k_norm = self.wide_norms = [
                ShardedRMSNorm(
                    num_heads * config.head_dim,
                    columns,
                    f"{prefix}.{part}_norm",
                    eps=traits.rms_norm_eps,
                    offset=traits.norm_offset,
                    dtype=dtype,
                )
                for part, (num_heads, columns) in ranges.items()
            ]
        self.attn = RadixAttention(
            num_heads=self.qkv_proj.num_heads,
            kv=KVSpec(self.qkv_proj.num_kv_heads, config.head_dim, config.head_dim),
            scale=traits.attention_scale,
            layer_id=model.place_of(layer_id),
            sliding_window=spec.window,
            soft_cap=traits.attention_soft_cap,
            scales_prefix=prefix if config.has_cache_scales else None,
            sinks=self._declare_sinks(f"{prefix}.sinks", config, dtype) if traits.has_sinks else None,
            has_gate=traits.has_output_gate,
        )

    def _declare_sinks(self, name: str, config: ModelConfig, dtype: torch.dtype) -> torch.nn.Parameter:
        """[heads of this rank]."""
        start, stop = (column // config.head_dim for column in self.qkv_proj.q_range)
        box = shard_box(name, (config.num_attention_heads,), 0, start, stop)
        return declare_weight((stop - start,), dtype, [box])

    def _attend(self, x: torch.Tensor, rotary: Rotation | None, forward_batch: ForwardBatch) -> torch.Tensor:
        """[num_tokens, hidden_size] -> [num_tokens, columns of o_proj]."""
        qkv = self.qkv_proj(x)
        if self.wide_norms is not None:
            q_size, kv_size = self.qkv_proj.q_size, self.qkv_proj.kv_size
            q_and_k = list(qkv[:, : q_size + kv_size].split([q_size, kv_size], dim=-1))
            norm_in_place(q_and_k, self.wide_norms, self.attn_tp_size)
        q = self.attn.rotate_and_store(qkv, rotary, self.norms, forward_batch)
        out = self.attn(q, forward_batch)
        return out.flatten(1) if not self.attn.has_gate else self.attn.gated(out, qkv).flatten(1)


class DecoderLayer(nn.Module):
    """Attention and MLP with their norms, and the residual carried beside the hidden states."""

    def __init__(self, model: "DecoderForCausalLM", layer_id: int):
        super().__init__()
        config, spec, prefix = model.config, model.config.layers[layer_id], f"model.layers.{layer_id}"
        self.rotary_id = None if spec.rope is None else model.ropes.index(spec.rope)
        self.attention_name = "linear_attn" if spec.is_linear else "self_attn"
        self.add_module(
            self.attention_name, self._make_attention(model, spec, layer_id, f"{prefix}.{self.attention_name}")
        )
        self.mlp_name = config.moe.traits.block if config.moe is not None else "mlp"
        self.add_module(self.mlp_name, self._make_mlp(model, spec, f"{prefix}.{self.mlp_name}"))
        # (before attention, after it, before the MLP, after it)
        self.norm_names = NORM_NAMES[config.traits.norms]
        for name in filter(None, self.norm_names):
            self.add_module(name, model.make_norm(f"{prefix}.{name}"))
        self.multiplier = config.traits.residual_multiplier
        self.dtype = model.dtype

    @functools.cached_property
    def _row_path(self) -> RowPath | None:
        """The way of a single token; None if there is none of its own."""
        attention, mlp = getattr(self, self.attention_name), getattr(self, self.mlp_name)
        before_attention, after_attention, before_mlp, after_mlp = self.norm_names
        is_plain = before_attention and before_mlp and not after_attention and not after_mlp and self.multiplier == 1
        if not is_plain or not isinstance(attention, Attention) or not isinstance(mlp, GatedMLP):
            return None
        if attention.wide_norms is not None or attention.attn.has_gate:
            return None
        first_norm, mlp_norm = getattr(self, before_attention), getattr(self, before_mlp)
        parts = (attention.qkv_proj, attention.attn, attention.norms, attention.o_proj)
        path = RowPath(first_norm, *parts, mlp_norm, mlp)
        return path if path.fits(self.dtype) else None

    @staticmethod
    def _make_attention(model: "DecoderForCausalLM", spec: LayerSpec, layer_id: int, prefix: str) -> AttentionBlock:
        """The first half: [num_tokens, hidden_size] -> the same shape, equal on every tp rank."""
        place = model.place_of(layer_id)
        if spec.is_linear:
            return DeltaNet(model.config, model.dtype, model.parallel.attention, place, prefix)
        if model.config.traits.latent is not None:
            sizes, owns = (model.dtype, model.parallel.attention, place, prefix), spec.owns_index
            return LatentAttention(model.config, *sizes, owns_index=owns)
        return Attention(model, spec, layer_id, prefix)

    def _make_mlp(self, model: "DecoderForCausalLM", spec: LayerSpec, prefix: str) -> GatedMLP | SparseMoeBlock:
        """The second half: [num_tokens, hidden_size] -> the same shape, equal on every tp rank."""
        config, traits = model.config, model.config.traits
        if spec.has_experts:
            return SparseMoeBlock(config, prefix, model.dtype, model.parallel)
        return GatedMLP(
            config.hidden_size,
            config.intermediate_size,
            prefix,
            bias=traits.mlp_bias,
            activation=traits.hidden_act,
            dtype=model.dtype,
            parallel=model.parallel,
        )

    def forward(
        self,
        x: torch.Tensor | RowSums,
        residual: torch.Tensor | None,
        rotaries: list[Rotation],
        forward_batch: ForwardBatch,
    ) -> tuple[torch.Tensor | RowSums, torch.Tensor]:
        """(hidden states, residual), both [num_tokens, hidden_size]; a stage's first layer is given no residual."""
        before_attention, after_attention, before_mlp, after_mlp = self.norm_names
        rotary = None if self.rotary_id is None else rotaries[self.rotary_id]
        if self._row_path is not None and self._row_path.takes(x, forward_batch):
            return self._row_path.forward(x, residual, rotary, forward_batch)
        x = whole(x)
        x, residual = self._enter(before_attention, x, residual)
        x = self._leave(after_attention, getattr(self, self.attention_name)(x, rotary, forward_batch))
        x, residual = self._enter(before_mlp, x, residual)
        return self._leave(after_mlp, self._run_mlp(x, forward_batch)), residual

    def _run_mlp(self, x: torch.Tensor, forward_batch: ForwardBatch) -> torch.Tensor:
        """The same; with data-parallel attention all ranks compute all groups' tokens, each its part of the weights.

        That takes one exchange there and one back. No router's choice goes over the host, and none can overflow a
        buffer: a rank gets every token once, however many of its experts that goes to.
        """
        mlp, sizes = getattr(self, self.mlp_name), forward_batch.group_sizes
        if sizes is None:
            return mlp(x)
        return sum_for_attention_groups(mlp.partial(gather_attention_groups(x, sizes)), sizes, forward_batch.own_group)

    def _enter(
        self, norm_name: str, x: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(what goes into a half, the residual beside it): their sum, and its norm where there is one."""
        if not norm_name:
            x = x if residual is None else x + residual
            return x, x
        norm = getattr(self, norm_name)
        return (norm(x), x) if residual is None else norm.add_and_norm(x, residual)

    def _leave(self, norm_name: str, x: torch.Tensor) -> torch.Tensor:
        """What a half adds to the residual."""
        if norm_name:
            x = getattr(self, norm_name)(x)
        return x if self.multiplier == 1 else x * self.multiplier


class DecoderModel(nn.Module):
    """One pipeline stage: the embedding in the first, a run of decoder layers, the final norm in the last."""

    def __init__(self, model: "DecoderForCausalLM"):
        super().__init__()
        config, dtype, parallel = model.config, model.dtype, model.parallel
        if parallel.is_first_stage:
            self.embed_tokens = VocabParallelEmbedding(
                config.vocab_size, config.hidden_size, "model.embed_tokens", dtype=dtype, parallel=parallel
            )
        # Keyed by their numbers in the whole model, so that names don't depend on the stage.
        self.layers = nn.ModuleDict({str(layer_id): DecoderLayer(model, layer_id) for layer_id in model.layer_ids})
        if parallel.is_last_stage:
            self.norm = model.make_norm("model.norm")
        self.embedding_multiplier = config.traits.embedding_multiplier
        if config.traits.rounds_embedding_multiplier:
            self.embedding_multiplier = torch.tensor(self.embedding_multiplier, device="cpu").to(dtype).item()
        self.parallel, self.hidden_size = parallel, config.hidden_size
        # Whether an index chooses before the stage, or within it, what layers behind the border attend to.
        first, behind = model.layer_ids.start, model.layer_ids.stop
        self.takes_choice = not parallel.is_first_stage and self._lacks_index(config, first)
        self.gives_choice = not parallel.is_last_stage and self._lacks_index(config, behind)

    @staticmethod
    def _lacks_index(config: ModelConfig, layer_id: int) -> bool:
        """Whether a layer attends to what another one has chosen."""
        latent = config.traits.latent
        return latent is not None and latent.index is not None and not config.layers[layer_id].owns_index

    def input_columns(self, forward_batch: ForwardBatch) -> int:
        """Of what comes from the stage before."""
        if not self.takes_choice:
            return self.hidden_size
        return self.hidden_size + choice_columns(next(iter(self.layers.values())), forward_batch)

    def forward(self, inputs: torch.Tensor, rotaries: list[Rotation], forward_batch: ForwardBatch) -> torch.Tensor:
        """Token ids, or the stage before's output -> this stage's output, normalised in the last stage.

        Between stages goes the sum of hidden states and residual, [num_tokens, hidden_size], and what stage_border
        puts behind it. With data-parallel attention it is that of the own tokens; ids and the last stage's output are
        all groups'.
        """
        x, sizes = inputs, forward_batch.group_sizes
        if self.parallel.is_first_stage:
            if sizes is None:
                x = self.embed_tokens(inputs)
            else:
                x = sum_for_attention_groups(self.embed_tokens.partial(inputs), sizes, forward_batch.own_group)
            if self.embedding_multiplier != 1:
                x = x * self.embedding_multiplier
        first, *others = self.layers.values()
        if self.takes_choice:
            x = take_choice(x, self.hidden_size, first)
        x, residual = first(x, None, rotaries, forward_batch)
        for layer in others:
            x, residual = layer(x, residual, rotaries, forward_batch)
        x = whole(x)
        if self.parallel.is_last_stage:
            x = self.norm.add_and_norm(x, residual)[0]
            return x if sizes is None else gather_attention_groups(x, sizes)
        x = x + residual
        return with_choice(x, first, forward_batch) if self.gives_choice else x


class DecoderForCausalLM(nn.Module):
    """The decoder with its output head, which one that makes embeddings doesn't have.

    Parameters are made on the meta device and bound to an arena later; before the first pass come `prepare`, which
    makes what is derived from the config alone, and `bind_attention`.
    """

    rotary: list[RotaryEmbedding]

    def __init__(self, config: ModelConfig, dtype: torch.dtype, parallel: ParallelConfig):
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.parallel = parallel
        self.layer_ids = parallel.layer_range(config.num_hidden_layers)
        self.ropes: list[RopeConfig] = []  # those of this stage's layers, each once
        for layer_id in self.layer_ids:
            rope = config.layers[layer_id].rope
            if rope is not None and rope not in self.ropes:
                self.ropes.append(rope)
        self.model = DecoderModel(self)
        if parallel.is_last_stage and config.embedding is None:
            tied = config.tie_word_embeddings
            name = "model.embed_tokens" if tied else "lm_head"  # a stage of its own holds a copy of the tied table
            self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, name, dtype=dtype, parallel=parallel)
            if tied and parallel.is_first_stage:
                self.lm_head.weight = self.model.embed_tokens.weight

    def place_of(self, layer_id: int) -> int:
        """The place of a layer among those of its kind, linear or not, of this stage."""
        layers = self.config.layers
        return sum(layers[one].is_linear == layers[layer_id].is_linear for one in self.layer_ids if one < layer_id)

    def attention_stand_in(self) -> RadixAttention | None:
        """What attention layers are like in other stages, of one that has none."""
        layers = self.config.layers
        if not all(layers[layer_id].is_linear for layer_id in self.layer_ids):
            return None
        place = next(layer_id for layer_id, layer in enumerate(layers) if not layer.is_linear)
        return Attention(self, layers[place], place, "").attn

    def make_norm(self, name: str, size: int | None = None) -> RMSNorm:
        """One of the decoder's norms; without a size, of hidden states."""
        traits = self.config.traits
        return RMSNorm(
            size or self.config.hidden_size,
            name,
            eps=traits.rms_norm_eps,
            offset=traits.norm_offset,
            dtype=self.dtype,
        )

    def prepare(self, device: torch.device) -> None:
        """Make what is derived from the config alone, on the device where the weights are."""
        self.rotary = [RotaryEmbedding(rope, self.config.head_dim, self.dtype, device) for rope in self.ropes]

    def forward(self, inputs: torch.Tensor, positions: torch.Tensor, forward_batch: ForwardBatch) -> torch.Tensor:
        """Inputs of this stage and int64 positions [num_tokens] -> its output [num_tokens, hidden_size]."""
        rotaries = [rotary.cos_sin(positions, forward_batch.is_long) for rotary in self.rotary]
        return self.model(inputs, rotaries, forward_batch)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[num_rows, hidden_size] -> float32 [num_rows, vocab_size]."""
        logits, traits = self.lm_head.logits(hidden_states), self.config.traits
        if traits.logits_divisor != 1:
            logits = logits / traits.logits_divisor
        cap = traits.logits_soft_cap
        return logits if cap is None else (logits / cap).tanh() * cap
