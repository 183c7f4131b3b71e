"""Owns the dense decoder model: Llama, Mistral and Qwen2 differ from each other only in what their configs say."""

import torch
from torch import nn

from ramet.srt.batch.forward_batch_info import ForwardBatch
from ramet.srt.configs.model_config import ModelConfig
from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.distributed.communication_op import tensor_model_parallel_all_reduce
from ramet.srt.layers.activation import get_activation
from ramet.srt.layers.attention.radix_attention import HeadNorms, RadixAttention
from ramet.srt.layers.layernorm import RMSNorm
from ramet.srt.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from ramet.srt.layers.rotary_embedding import CosSin, RotaryEmbedding
from ramet.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding


class LlamaMLP(nn.Module):
    """down(act(gate(x)) * up(x)), gate and up as one matrix."""

    def __init__(self, config: ModelConfig, prefix: str, dtype: torch.dtype, parallel: ParallelConfig):
        super().__init__()
        bias, size = config.mlp_bias, config.intermediate_size
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size,
            [f"{prefix}.gate_proj", f"{prefix}.up_proj"],
            [size, size],
            bias=bias,
            dtype=dtype,
            parallel=parallel,
        )
        self.down_proj = RowParallelLinear(
            size, config.hidden_size, f"{prefix}.down_proj", bias=bias, dtype=dtype, parallel=parallel
        )
        self.activation = get_activation(config.hidden_act)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[num_tokens, hidden_size] -> [num_tokens, hidden_size]."""
        return self.down_proj(self.gate_up_proj.gated(x, self.activation))


class LlamaAttention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, model: "LlamaForCausalLM", layer_id: int, prefix: str):
        super().__init__()
        config, dtype, parallel = model.config, model.dtype, model.parallel
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            config.head_dim,
            config.num_attention_heads,
            config.num_key_value_heads,
            prefix,
            bias=config.qkv_bias,
            dtype=dtype,
            parallel=parallel.attention,
        )
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * config.head_dim,
            config.hidden_size,
            f"{prefix}.o_proj",
            bias=config.o_bias,
            dtype=dtype,
            parallel=parallel.attention,
        )
        self.norms: HeadNorms | None = None
        if model.has_qk_norm:
            self.q_norm = RMSNorm(config.head_dim, f"{prefix}.q_norm", eps=config.rms_norm_eps, dtype=dtype)
            self.k_norm = RMSNorm(config.head_dim, f"{prefix}.k_norm", eps=config.rms_norm_eps, dtype=dtype)
            self.norms = HeadNorms(self.q_norm, self.k_norm)
        self.attn = RadixAttention(
            num_heads=self.qkv_proj.num_heads,
            num_kv_heads=self.qkv_proj.num_kv_heads,
            head_dim=config.head_dim,
            layer_id=layer_id - model.layer_ids.start,
            sliding_window=config.layer_windows[layer_id],
        )

    def forward(self, x: torch.Tensor, rotary: CosSin, forward_batch: ForwardBatch) -> torch.Tensor:
        """[num_tokens, hidden_size] -> [num_tokens, hidden_size]."""
        if forward_batch.attn_tokens is None:
            return self.o_proj(self._attend(x, rotary, forward_batch))
        # Data-parallel attention: each rank adds its part, of its own group's tokens and its own heads.
        output = torch.zeros_like(x)
        if forward_batch.batch_size > 0:
            own = forward_batch.attn_tokens
            output[own] = self.o_proj.partial(self._attend(x[own], rotary, forward_batch))
        return tensor_model_parallel_all_reduce(output)

    def _attend(self, x: torch.Tensor, rotary: CosSin, forward_batch: ForwardBatch) -> torch.Tensor:
        """[num_tokens, hidden_size] -> [num_tokens, columns of o_proj]."""
        q = self.attn.rotate_and_store(self.qkv_proj(x), rotary, self.norms, forward_batch)
        return self.attn(q, forward_batch).flatten(1)


class LlamaDecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm, with the residual carried beside the hidden states."""

    def __init__(self, model: "LlamaForCausalLM", layer_id: int):
        super().__init__()
        config, dtype, prefix = model.config, model.dtype, f"model.layers.{layer_id}"
        self.self_attn = LlamaAttention(model, layer_id, f"{prefix}.self_attn")
        self.mlp_name = model.mlp_name
        self.add_module(self.mlp_name, model.make_mlp(layer_id))
        self.input_layernorm = RMSNorm(
            config.hidden_size, f"{prefix}.input_layernorm", eps=config.rms_norm_eps, dtype=dtype
        )
        self.post_attention_layernorm = RMSNorm(
            config.hidden_size, f"{prefix}.post_attention_layernorm", eps=config.rms_norm_eps, dtype=dtype
        )

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        rotary: CosSin,
        forward_batch: ForwardBatch,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(hidden states, residual), both [num_tokens, hidden_size]; a stage's first layer is given no residual."""
        if residual is None:
            x, residual = self.input_layernorm(x), x
        else:
            x, residual = self.input_layernorm.add_and_norm(x, residual)
        x = self.self_attn(x, rotary, forward_batch)
        x, residual = self.post_attention_layernorm.add_and_norm(x, residual)
        return getattr(self, self.mlp_name)(x), residual


class LlamaModel(nn.Module):
    """One pipeline stage: the embedding in the first, a run of decoder layers, the final norm in the last."""

    def __init__(self, model: "LlamaForCausalLM"):
        super().__init__()
        config, dtype, parallel = model.config, model.dtype, model.parallel
        if parallel.is_first_stage:
            self.embed_tokens = VocabParallelEmbedding(
                config.vocab_size, config.hidden_size, "model.embed_tokens", dtype=dtype, parallel=parallel
            )
        # Keyed by their numbers in the whole model, so that names don't depend on the stage.
        self.layers = nn.ModuleDict({str(layer_id): LlamaDecoderLayer(model, layer_id) for layer_id in model.layer_ids})
        if parallel.is_last_stage:
            self.norm = RMSNorm(config.hidden_size, "model.norm", eps=config.rms_norm_eps, dtype=dtype)
        self.parallel = parallel

    def forward(self, inputs: torch.Tensor, rotary: CosSin, forward_batch: ForwardBatch) -> torch.Tensor:
        """Token ids, or the stage before's output -> this stage's output, normalised in the last stage.

        Between stages goes the sum of hidden states and residual, [num_tokens, hidden_size].
        """
        x = self.embed_tokens(inputs) if self.parallel.is_first_stage else inputs
        first, *others = self.layers.values()
        x, residual = first(x, None, rotary, forward_batch)
        for layer in others:
            x, residual = layer(x, residual, rotary, forward_batch)
        return self.norm.add_and_norm(x, residual)[0] if self.parallel.is_last_stage else x + residual


class LlamaForCausalLM(nn.Module):
    """The dense decoder with its output head, which one that makes embeddings doesn't have.

    Parameters are made on the meta device and bound to an arena later; before the first pass come `prepare`, which
    makes what is derived from the config alone, and `bind_attention`.
    """

    rotary: RotaryEmbedding

    has_qk_norm = False
    mlp_name = "mlp"  # of a decoder layer's second half, as an attribute and in checkpoints

    def __init__(self, config: ModelConfig, dtype: torch.dtype, parallel: ParallelConfig):
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.parallel = parallel
        self.layer_ids = parallel.layer_range(config.num_hidden_layers)
        self.model = LlamaModel(self)
        if parallel.is_last_stage and config.embedding is None:
            tied = config.tie_word_embeddings
            name = "model.embed_tokens" if tied else "lm_head"  # a stage of its own holds a copy of the tied table
            self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, name, dtype=dtype, parallel=parallel)
            if tied and parallel.is_first_stage:
                self.lm_head.weight = self.model.embed_tokens.weight

    def make_mlp(self, layer_id: int) -> nn.Module:
        """The second half of a decoder layer: [num_tokens, hidden_size] -> the same shape, equal on every tp rank."""
        return LlamaMLP(self.config, self.mlp_prefix(layer_id), self.dtype, self.parallel)

    def mlp_prefix(self, layer_id: int) -> str:
        """What the checkpoint's names of a layer's second half begin with."""
        return f"model.layers.{layer_id}.{self.mlp_name}"

    def prepare(self, device: torch.device) -> None:
        """Make what is derived from the config alone, on the device where the weights are."""
        self.rotary = RotaryEmbedding(self.config.rope, self.config.head_dim, self.dtype, device)

    def forward(self, inputs: torch.Tensor, positions: torch.Tensor, forward_batch: ForwardBatch) -> torch.Tensor:
        """Inputs of this stage and int64 positions [num_tokens] -> its output [num_tokens, hidden_size]."""
        return self.model(inputs, self.rotary.cos_sin(positions), forward_batch)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[num_rows, hidden_size] -> float32 [num_rows, vocab_size]."""
        return self.lm_head.logits(hidden_states)


class MistralForCausalLM(LlamaForCausalLM):
    """Llama with a sliding window, which the config's layer windows already hold."""


class Qwen2ForCausalLM(LlamaForCausalLM):
    """Llama with biases on q, k and v alone, which the config's biases already say."""
