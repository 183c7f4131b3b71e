"""Owns the decoder that all model families are: its layers are built from the traits that a config was read into."""

import torch
from torch import nn

from ramet.srt.batch.forward_batch_info import ForwardBatch
from ramet.srt.configs.layer_specs import LayerSpec
from ramet.srt.configs.model_config import ModelConfig
from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.configs.rope_config import RopeConfig
from ramet.srt.distributed.communication_op import tensor_model_parallel_all_reduce
from ramet.srt.layers.attention.radix_attention import HeadNorms, RadixAttention
from ramet.srt.layers.layernorm import RMSNorm
from ramet.srt.layers.linear import QKVParallelLinear, RowParallelLinear
from ramet.srt.layers.mlp import GatedMLP
from ramet.srt.layers.moe import SparseMoeBlock
from ramet.srt.layers.rotary_embedding import CosSin, RotaryEmbedding
from ramet.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding


class Attention(nn.Module):
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
        )
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * config.head_dim,
            config.hidden_size,
            f"{prefix}.o_proj",
            bias=traits.o_bias,
            dtype=dtype,
            parallel=parallel.attention,
        )
        self.norms: HeadNorms | None = None
        if traits.qk_norm == "head":
            self.q_norm = model.make_norm(f"{prefix}.q_norm", config.head_dim)
            self.k_norm = model.make_norm(f"{prefix}.k_norm", config.head_dim)
            self.norms = HeadNorms(self.q_norm, self.k_norm)
        self.attn = RadixAttention(
            num_heads=self.qkv_proj.num_heads,
            num_kv_heads=self.qkv_proj.num_kv_heads,
            head_dim=config.head_dim,
            scale=traits.attention_scale,
            layer_id=layer_id - model.layer_ids.start,
            sliding_window=spec.window,
        )

    def forward(self, x: torch.Tensor, rotary: CosSin | None, forward_batch: ForwardBatch) -> torch.Tensor:
        """[num_tokens, hidden_size] -> [num_tokens, hidden_size]."""
        if forward_batch.attn_tokens is None:
            return self.o_proj(self._attend(x, rotary, forward_batch))
        # Data-parallel attention: each rank adds its part, of its own group's tokens and its own heads.
        output = torch.zeros_like(x)
        if forward_batch.batch_size > 0:
            own = forward_batch.attn_tokens
            output[own] = self.o_proj.partial(self._attend(x[own], rotary, forward_batch))
        return tensor_model_parallel_all_reduce(output)

    def _attend(self, x: torch.Tensor, rotary: CosSin | None, forward_batch: ForwardBatch) -> torch.Tensor:
        """[num_tokens, hidden_size] -> [num_tokens, columns of o_proj]."""
        q = self.attn.rotate_and_store(self.qkv_proj(x), rotary, self.norms, forward_batch)
        return self.attn(q, forward_batch).flatten(1)


class DecoderLayer(nn.Module):
    """Attention and MLP, with the residual carried beside the hidden states."""

    def __init__(self, model: "DecoderForCausalLM", layer_id: int):
        super().__init__()
        config, spec, prefix = model.config, model.config.layers[layer_id], f"model.layers.{layer_id}"
        self.rotary_id = model.ropes.index(spec.rope)
        self.self_attn = Attention(model, spec, layer_id, f"{prefix}.self_attn")
        self.mlp_name = config.moe.traits.block if config.moe is not None else "mlp"
        self.add_module(self.mlp_name, self._make_mlp(model, spec, f"{prefix}.{self.mlp_name}"))
        self.input_layernorm = model.make_norm(f"{prefix}.input_layernorm")
        self.post_attention_layernorm = model.make_norm(f"{prefix}.post_attention_layernorm")

    def _make_mlp(self, model: "DecoderForCausalLM", spec: LayerSpec, prefix: str) -> nn.Module:
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
        x: torch.Tensor,
        residual: torch.Tensor | None,
        rotaries: list[CosSin],
        forward_batch: ForwardBatch,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(hidden states, residual), both [num_tokens, hidden_size]; a stage's first layer is given no residual."""
        if residual is None:
            x, residual = self.input_layernorm(x), x
        else:
            x, residual = self.input_layernorm.add_and_norm(x, residual)
        x = self.self_attn(x, rotaries[self.rotary_id], forward_batch)
        x, residual = self.post_attention_layernorm.add_and_norm(x, residual)
        return getattr(self, self.mlp_name)(x), residual


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
        self.parallel = parallel

    def forward(self, inputs: torch.Tensor, rotaries: list[CosSin], forward_batch: ForwardBatch) -> torch.Tensor:
        """Token ids, or the stage before's output -> this stage's output, normalised in the last stage.

        Between stages goes the sum of hidden states and residual, [num_tokens, hidden_size].
        """
        x = self.embed_tokens(inputs) if self.parallel.is_first_stage else inputs
        first, *others = self.layers.values()
        x, residual = first(x, None, rotaries, forward_batch)
        for layer in others:
            x, residual = layer(x, residual, rotaries, forward_batch)
        return self.norm.add_and_norm(x, residual)[0] if self.parallel.is_last_stage else x + residual


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
            if rope not in self.ropes:
                self.ropes.append(rope)
        self.model = DecoderModel(self)
        if parallel.is_last_stage and config.embedding is None:
            tied = config.tie_word_embeddings
            name = "model.embed_tokens" if tied else "lm_head"  # a stage of its own holds a copy of the tied table
            self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, name, dtype=dtype, parallel=parallel)
            if tied and parallel.is_first_stage:
                self.lm_head.weight = self.model.embed_tokens.weight

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
        rotaries = [rotary.cos_sin(positions) for rotary in self.rotary]
        return self.model(inputs, rotaries, forward_batch)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[num_rows, hidden_size] -> float32 [num_rows, vocab_size]."""
        return self.lm_head.logits(hidden_states)
